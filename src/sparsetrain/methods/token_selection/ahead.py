"""One look at all rows before any is selected: what scores tokens is found in it, and what it computed is kept.

The look is the model's forward without gradients. It keeps of every block the output and the keys and values, so the
training forward that follows runs the selected rows alone: 1 + r forwards and r backwards instead of 2 and r. What is
kept is the model's width a token and layer, as in gradient checkpointing, beside keys and values, which the backward
needs anyway; a block's share is freed when the block has run, before the others' activations are saved.

Where the training forward computes something else than the look (dropout, sparse sites, checkpointed blocks) nothing is
kept, and both forwards are paid; as where keys train behind weights that `fully_shard` takes away after each forward.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sparsetrain.core.modes import evaluating, flagged_evaluating, modules_of
from sparsetrain.core.shards import is_sharded
from sparsetrain.methods.token_selection.arguments import detached
from sparsetrain.methods.token_selection.attention import attend_to_all, key_values, trained_keys
from sparsetrain.methods.token_selection.loss import head_of, takes_rows
from sparsetrain.methods.token_selection.module import SelectedBlock
from sparsetrain.methods.token_selection.notes import Context
from sparsetrain.methods.token_selection.passes import adapters_on_all_rows
from sparsetrain.methods.token_selection.policies import Batch
from sparsetrain.methods.token_selection.scores import scores_at_head
from sparsetrain.methods.token_selection.selector import Kept, Selector
from sparsetrain.ops.selected_rows import Rows
from sparsetrain.ops.selected_rows.received import received_mass
from sparsetrain.surgery.attention import AttentionCall, stand_in_of, standing_in
from sparsetrain.surgery.lora import plain_lora
from sparsetrain.surgery.site import Site
from sparsetrain.surgery.targets import IGNORED, SHIFTED, predicted

_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout)


@torch.no_grad()
def look_ahead(model: Any, given: dict[str, Any], *, policy: str | None, attended: bool) -> dict[str, Tensor]:
    """What the draw asks of the model, [b, t] each; what the training forward can use is left with the selector.

    The model's dropout is off meanwhile.

    Args:
        model: converted with `TokenSelection`.
        given: arguments of its forward, by name.
        policy: `loss` or `gradient_norm` for `token_scores`; None for none.
        attended: `token_attention` too: the attention that tokens receive from targets, over all heads and layers.

    Raises:
        ValueError: the batch has no label a token, or the model no linear head for the policy.
    """
    selector: Selector = model.selector
    target_bt = _targets(model, given, policy)
    look = Look(Rows.of([row.nonzero().flatten() for row in target_bt != IGNORED], target_bt.shape[1]), attended)
    names = model.argument_names()
    inputs = {name: value for name, value in given.items() if name in names and name not in ("labels", SHIFTED)}
    modules = modules_of(model)
    alike = _runs_alike(modules, given) and not (selector.config.train_keys and any(map(is_sharded, modules)))
    evaluates = flagged_evaluating(modules) if alike else evaluating(model)
    # looking first: in evaluation mode a LoRA with dropout would pass for a plain one, and its dropout unseen
    with selector.head_is(look.note_head), look.into(modules), evaluates:
        model.forward(**inputs)
    if alike and not look.drops:
        selector.kept = look.kept
    found = {}
    if policy:
        assert look.hidden_btd is not None
        found["token_scores"] = scores_at_head(model, look.hidden_btd, target_bt, policy)
    if attended:
        assert look.mass_bt is not None
        found["token_attention"] = look.mass_bt
    return found


def remembered(model: Any, given: dict[str, Any], policy: str, pad: int | None) -> tuple[Tensor, Callable]:
    """(the scores [b, t] of the batch's last visit, what takes the hidden states before the head for the next one).

    Raises:
        ValueError: the batch has no label a token, or the model no linear head that may run on some rows.
    """
    selector, target_bt = model.selector, _targets(model, given, policy)
    if not takes_rows(model):
        raise ValueError(
            f"token_selection: scores='previous' scores what {type(model).__name__}'s head is given in training, and "
            "its logits are more than the head's linear. Use scores=now."
        )
    batch = Batch.of(given, causal=selector.causal, pad=pad)

    def note(hidden_btd: Tensor) -> None:
        selector.previous.note(batch, scores_at_head(model, hidden_btd, target_bt, policy))

    return selector.previous.of(batch), note


def _targets(model: Any, given: dict[str, Any], policy: str | None) -> Tensor:
    """The label that each position predicts, [b, t]."""
    target_bt, tokens = predicted(given, model.selector.causal), given.get("input_ids")
    if tokens is None:
        tokens = given.get("inputs_embeds")
    if (
        target_bt is None
        or tokens is None
        or target_bt.shape != tokens.shape[:2]
        or (policy and head_of(model) is None)
    ):
        asks = f"policy={policy!r} scores" if policy else "context='attended' ranks"
        raise ValueError(
            f"token_selection: {asks} the tokens of a language model by their labels, and "
            f"{type(model).__name__} was given {'no label' if target_bt is None else 'one label a row'}. "
            f"Use {'policy=random or prefix' if policy else 'context=random'}."
        )
    return target_bt


class Look(TorchFunctionMode):
    """Notes a forward without gradients.

    Args:
        targets: the rows that predict something.
        attended: whether their attention is noted.

    Attributes:
        kept: what every converted block said, call by call.
        mass_bt: attention received from targets, summed over heads and layers.
        hidden_btd: what the head was given.
        drops: in training, a dropout would have changed something.
    """

    def __init__(self, targets: Rows, attended: bool) -> None:
        super().__init__()
        self.targets, self.attended = targets, attended
        self.kept: dict[Any, list[Kept]] = defaultdict(list)
        self.mass_bt: Tensor | None = None
        self.hidden_btd: Tensor | None = None
        self.drops = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS and (args[1] if len(args) > 1 else kwargs.get("p", 0.5)) > 0:
            self.drops = True
        return func(*args, **kwargs)

    def note_head(self, hidden_btd: Tensor) -> Tensor:
        """Answers for the head, which computes nothing."""
        self.hidden_btd = hidden_btd
        return hidden_btd

    @contextmanager
    def into(self, modules: list[nn.Module]) -> Iterator[None]:
        """Every converted block among a model's modules is noted inside."""
        with ExitStack() as stack:
            for block in modules:
                state = vars(block).get("_modules", {}).get("selected")
                if isinstance(state, SelectedBlock):
                    self._into_block(stack, block, state)
            stack.enter_context(self)
            yield

    def _into_block(self, stack: ExitStack, block: nn.Module, state: SelectedBlock) -> None:
        calls: list[tuple[AttentionCall, Context | None]] = []
        attention = block.get_submodule(state.attention)
        sparse = stand_in_of(attention)

        trains_keys = state.selector.config.train_keys

        def begins(module: nn.Module, args: Any, kwargs: Any) -> Any:
            torch.set_grad_enabled(True)  # until the attention has keys and values
            return detached(args), detached(kwargs)

        def attend(call: AttentionCall) -> Tensor:
            calls.append((call, trained_keys(call) if trains_keys else None))
            if self.attended:
                self._add_mass(call)
            return attend_to_all(call, key_values(call)) if sparse is None else sparse(call)

        def ran(module: nn.Module, args: Any, out: Any) -> None:
            call, context = calls.pop()
            self.kept[state].append(Kept(out, key_values(call), context))

        stack.enter_context(standing_in(attention, attend))
        stack.enter_context(adapters_on_all_rows(plain_lora(block)))
        stack.callback(block.register_forward_hook(ran).remove)
        if trains_keys:
            stack.callback(block.register_forward_pre_hook(begins, with_kwargs=True).remove)

    def _add_mass(self, call: AttentionCall) -> None:
        rows, t = self.targets.to(call.q.device), self.targets.num_tokens
        q_bhkd = rows.gather(call.q.transpose(1, 2)).transpose(1, 2)
        mass_bt = received_mass(q_bhkd, key_values(call), rows)[:, -t:].cpu()  # layers may lie on several devices
        self.mass_bt = mass_bt if self.mass_bt is None else self.mass_bt + mass_bt


def _runs_alike(modules: list[nn.Module], given: dict[str, Any]) -> bool:
    """Does the training forward say on all rows what a look says, dropout aside, and does nobody ask for a cache?"""
    if given.get("past_key_values") is not None or given.get("use_cache"):
        return False
    return not any(
        vars(m).get("gradient_checkpointing") or (isinstance(m, Site) and not isinstance(m, SelectedBlock))
        for m in modules
    )
