"""Token selection inside a model: the blocks' new forward.

x_{l+1} = block(x_l) on all rows; gradient flows through the selected rows of x, K and V alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core.autograd import in_backward
from sparsetrain.core.backend import choose
from sparsetrain.core.host_memory import OnHost
from sparsetrain.core.modes import modules_of, parameters_of
from sparsetrain.methods.token_selection.arguments import detached, first_of, on_rows, with_first
from sparsetrain.methods.token_selection.attention import AttentionOfAllRows, AttentionOfSelectedRows, attaches_loss
from sparsetrain.methods.token_selection.layers import Layers, layers_of
from sparsetrain.methods.token_selection.notes import FoundKeys, Note, Notes
from sparsetrain.methods.token_selection.passes import on_all_rows, on_selected_rows
from sparsetrain.methods.token_selection.recomputed import in_pieces, recomputed
from sparsetrain.methods.token_selection.selector import Selector
from sparsetrain.ops.selected_rows import KeyValues, Rows, keep, replace_rows, selected_attention_reference
from sparsetrain.surgery.attention import AttentionCall, stand_in_of, standing_in
from sparsetrain.surgery.lora import runs_as
from sparsetrain.surgery.reclass import dense_forward
from sparsetrain.surgery.site import Site
from sparsetrain.surgery.targets import ROWS as DENSE


class SelectedBlock(Site):
    """State of one converted block; it has no parameters. What drives schedules calls it.

    Args:
        attention: the attention's name in the block. rowwise: those of modules that treat rows one by one.
    """

    def __init__(self, selector: Selector, attention: str, rowwise: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.selector, self.attention, self.rowwise = selector, attention, rowwise
        self.last: dict[str, float] = {}
        self.ran = selector.ran
        self.settled: list[nn.Module] | None = None

    def is_watched(self, layers: Layers) -> bool:
        """Is it unknown whether a block with these layers calls anything else that has to be noted, or does it?"""
        return layers.all != self.settled

    def set_step(self, step: int, total_steps: int | None) -> None:
        self.selector.begin_step(step)

    def run_dense(self, dense: bool) -> None:
        super().run_dense(dense)
        self.selector.dense = dense

    def stats(self) -> dict[str, float]:
        return dict(self.last)

    def refuses(self, arguments: Any) -> str | None:
        if getattr(arguments, "label_smoothing_factor", 0):
            return (
                f"label_smoothing_factor={arguments.label_smoothing_factor} lets the trainer compute the loss of all "
                "tokens, selected or not, from logits. Set it to 0"
            )
        if self.selector.config.recompute and getattr(arguments, "gradient_checkpointing", False):
            return (
                "gradient checkpointing keeps the inputs of all rows, and recompute=True in its place keeps less. "
                "Give one of them"
            )
        return None

    def trained_with(self, arguments: Any) -> None:
        # SFTConfig's own losses are sums over tokens. DPO, KTO, GRPO and their kin have a weight of the reference, beta
        sums = getattr(arguments, "loss_type", None) in (None, "nll", "chunked_nll") and not hasattr(arguments, "beta")
        self.selector.reads_all = not sums

    def note(self, rows: Rows, everything: Any) -> None:
        """Keep numbers for the report."""
        floor = 0
        if everything is not None:
            floor = sum(x.numel() * x.element_size() for x in (everything.k_bgsd, everything.v_bgsd))
        self.last = {"selected_tokens": float(sum(rows.counts)), "key_value_bytes": float(floor)}


RECOMPUTED = (
    "token_selection: a block is called while gradients are computed, outside of its model's forward, so the selection "
    "that it was run with is not known. Turn checkpointing on with the model's gradient_checkpointing_enable() "
    "instead of checkpointing blocks from outside."
)


_BACKENDS = ("torch", "triton", "sdpa", "flex", "reference")
"""Two passes with any of the first four as their attention, or the definition."""


class SelectsTokens:
    """Mixed into a block: in training, gradient flows through the selected rows alone."""

    selected: SelectedBlock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # An argument, and given outside of `forward`: gradient checkpointing, which wraps the forward, hands the same
        # selection to the recomputation.
        if self.training and torch.is_grad_enabled():  # type: ignore[attr-defined]
            rows = self.selected.selector.rows_for(args[0] if args else kwargs["hidden_states"])
            if rows is not None:
                kwargs["selected_rows"] = rows
            elif in_backward():
                raise RuntimeError(RECOMPUTED)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, selected_rows: Rows | None = None, **kwargs: Any) -> Any:
        if selected_rows is None or selected_rows.everything:
            return dense_forward(SelectsTokens, self, *args, **kwargs)
        if kwargs.get(DENSE) is not None:  # beside rows that run dense for their own sake, selected ones do
            kwargs[DENSE] = kwargs[DENSE] | selected_rows.selected_bt
        attention = self.get_submodule(self.selected.attention)  # type: ignore[attr-defined]
        if not torch.is_grad_enabled() and stand_in_of(attention) is None:
            # the values that a checkpointed block is first run for; beside sparse ones they need the second pass
            return dense_forward(SelectsTokens, self, *args, **kwargs)
        if choose("token_selection", "auto", dict.fromkeys(_BACKENDS)) == "reference":
            return _by_definition(self, selected_rows, args, kwargs)
        if self.selected.selector.config.recompute and not getattr(self, "gradient_checkpointing", False):
            return _recomputing(self, selected_rows, args, kwargs)
        return _in_two_passes(self, selected_rows, args, kwargs)


@torch.compiler.disable()  # traced, modes that look into its calls lose the gradient, or end in a TypeError
def _in_two_passes(block: Any, rows: Rows, args: tuple, kwargs: dict[str, Any]) -> Any:
    state: SelectedBlock = block.selected
    attention = block.get_submodule(state.attention)
    dense_bt = kwargs.get(DENSE)
    notes = Notes(rows, diverges=dense_bt is not None, trains_keys=state.selector.config.train_keys)
    layers = layers_of(block)
    watched = state.is_watched(layers)
    first = kwargs if dense_bt is None else kwargs | {DENSE: dense_bt & ~rows.selected_bt}
    x = args[0] if args else kwargs["hidden_states"]
    notes.ends_at_attention = recomputing = getattr(block, "gradient_checkpointing", False) and in_backward()
    kept = state.selector.take_kept(state)
    if kept is not None:  # all rows have run already, when tokens were scored
        out, notes.everything, notes.context = kept
    else:
        out = _on_all_rows(block, attention, notes, layers, watched, x, args, first)
    own_args, own_kwargs = on_rows(args, kwargs, rows)
    if dense_bt is not None:
        own_kwargs[DENSE] = torch.ones_like(rows.index_bk, dtype=torch.bool)
    attends = AttentionOfSelectedRows(notes)
    with (
        state.watching(),
        on_selected_rows(layers, notes, watched=watched),
        standing_in(attention, attends),
    ):
        selected = dense_forward(SelectsTokens, block, *own_args, **own_kwargs)
    if watched and not notes.functional:
        state.settled = layers.all
    state.note(rows, notes.everything)
    y, y_selected = first_of(out), first_of(selected)
    if recomputing:
        # Checkpointing one block asks for no value of the recomputed output. What did ask would read NaN.
        y, out = torch.full_like(x, float("nan")), selected
    if notes.diverged and kept is None:
        y = _written_over(y, y_selected.detach(), rows)
    return with_first(out, replace_rows(y, y_selected, rows))


@torch.compiler.disable()  # as above
def _recomputing(block: Any, rows: Rows, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One pass over all rows, of which the selected ones run again in the backward."""
    state: SelectedBlock = block.selected
    attention = block.get_submodule(state.attention)
    _refuse_recompute(block, attention, args, kwargs)
    notes, kept = Notes(rows), state.selector.take_kept(state)
    if kept is not None:
        out, notes.everything, _ = kept
    else:
        out = _in_pieces(block, attention, notes, args, kwargs)
    state.note(rows, notes.everything)
    own_args, own_kwargs = on_rows(args, kwargs, rows)
    x_bkd = own_args[0] if own_args else own_kwargs.pop("hidden_states")

    def again(x: Tensor, everything: KeyValues, masks: list[Note | None]) -> Tensor:
        second = Notes(rows, diverges=True)
        second.said, second.everything, second.diverged = masks, everything, True
        layers = layers_of(block)
        watched = state.is_watched(layers)
        attends = AttentionOfSelectedRows(second)
        with (
            state.watching(),
            on_selected_rows(layers, second, watched=watched),
            standing_in(attention, attends),
        ):
            y = first_of(dense_forward(SelectsTokens, block, x, *own_args[1:], **own_kwargs))
        if watched and not second.functional:
            state.settled = layers.all
        return y

    e, host = notes.everything, None
    assert e is not None, "a block whose attention was not called"
    if state.selector.config.offload:
        host = state.selector.waiting = OnHost((e.k_bgsd, e.v_bgsd), state.selector.waiting)
    trained = [parameter for parameter in parameters_of(block) if parameter.requires_grad]
    y = first_of(out)
    y_bkd = recomputed(x_bkd, rows.gather(y), e, notes.said, again, trained, host)
    return with_first(out, replace_rows(y, y_bkd, rows))


def _in_pieces(block: Any, attention: Any, notes: Notes, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The block on all rows, without gradient; of what it says only masks of dropouts are noted."""
    layers = layers_of(block)
    watched = block.selected.is_watched(layers)
    modules: list[Any] = [block.get_submodule(name) for name in block.selected.rowwise]
    modules = [module for module in modules if not any(map(_reads_rows_together, modules_of(module)))]
    pieces = {module: partial(in_pieces, partial(type(module).forward, module)) for module in modules}
    attends = AttentionOfAllRows(notes, None)
    with (
        torch.no_grad(),
        on_all_rows(layers, notes, watched=watched, only_dropouts=True),
        standing_in(attention, attends),
        runs_as(pieces),
    ):
        out = dense_forward(SelectsTokens, block, *detached(args), **detached(kwargs))
    notes.attended = None
    return out


def _reads_rows_together(module: nn.Module) -> bool:
    """A dropout is drawn once for all rows, and a method's own module (a router) may count them."""
    return isinstance(module, Site) or (isinstance(module, nn.Dropout) and module.p > 0 and module.training)


def _refuse_recompute(block: Any, attention: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    if stand_in_of(attention) is not None or kwargs.get(DENSE) is not None:
        raise ValueError(
            "token_selection: recompute=True runs the selected rows of a block again with a dense attention, and "
            f"{type(block).__name__} has a sparse one. Leave recompute out, or the sparse attention."
        )
    others = [*args[1:], *(value for name, value in kwargs.items() if name != "hidden_states")]
    if any(isinstance(value, Tensor) and value.requires_grad for value in others):
        raise ValueError(
            "token_selection: recompute=True gives gradient to what a block was given first, and "
            f"{type(block).__name__} was given another tensor that trains (an encoder's states). Leave recompute out."
        )


def _on_all_rows(
    block: Any, attention: Any, notes: Notes, layers: Layers, watched: bool, x: Tensor, args: tuple,
    kwargs: dict[str, Any],
) -> Any:  # fmt: skip
    """The first pass: what the block says, noted. Where keys train, gradient is on until the attention has them."""
    sparse = stand_in_of(attention)
    attends = AttentionOfAllRows(notes, sparse)
    args, kwargs = detached(args), detached(kwargs)
    grad = torch.set_grad_enabled(notes.trains_keys)
    with grad, on_all_rows(layers, notes, watched=watched), standing_in(attention, attends):
        try:
            return dense_forward(SelectsTokens, block, *args, **kwargs)
        except FoundKeys:  # a block that is recomputed for its backward needs no more of the other rows
            return x


def _written_over(y: Tensor, y_selected: Tensor, rows: Rows) -> Tensor:
    y, y_selected = y.clone(), y_selected.to(y.dtype).flatten(0, 1)
    index = rows.flat_n
    if rows.used_bk is not None:
        used = rows.used_bk.flatten()
        index, y_selected = index[used], y_selected[used]
    y.view(-1, *y.shape[2:]).index_copy_(0, index, y_selected)
    return y


def _by_definition(block: Any, rows: Rows, args: tuple, kwargs: dict[str, Any]) -> Any:
    """where(selected, x, x.detach()) at the block's input, keys and values (unless these train) and output."""
    attention = block.get_submodule(block.selected.attention)
    selected_bt = rows.selected_bt
    keys_bt = torch.ones_like(selected_bt) if block.selected.selector.config.train_keys else selected_bt

    sparse = stand_in_of(attention)

    def attend(call: AttentionCall) -> Tensor:
        form = {"causal": call.causal, "scale": call.scale, "window": call.window}
        form |= {"segments_bt": call.segments, "looks_at_bt": call.looks_at}
        out = selected_attention_reference(call.q, call.k, call.v, keys_bt, **form)
        if sparse is None:
            return out
        with torch.no_grad():
            other = sparse(call)
        out = torch.where(selected_bt[:, None, :, None], out, other)
        with_loss = attaches_loss(sparse, call)
        return out if with_loss is None else with_loss(out)

    if args:
        args = (keep(args[0], selected_bt), *args[1:])
    else:
        kwargs = {**kwargs, "hidden_states": keep(kwargs["hidden_states"], selected_bt)}
    with standing_in(attention, attend):
        out = dense_forward(SelectsTokens, block, *args, **kwargs)
    return with_first(out, keep(first_of(out), selected_bt))
