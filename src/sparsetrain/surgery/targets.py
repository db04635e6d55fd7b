"""Rows that predict a label compute densely: the model's forward sees the labels, its blocks and sites learn the rows.

Few tokens of a prompt with its completion have a loss. Where those run dense and the context alone runs sparse, most of
the sparse forward's error is gone at little cost (SparseLoRA, arXiv 2506.16500, section 3.3). The rows are each row's
own, whatever stands beside it in the batch, and gradients are those of the function that is computed.

Without a training forward no row is dense: what is evaluated has no labels when it is used.

Legend: b samples, t tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, Undo, submodule
from sparsetrain.core.cost import Cost
from sparsetrain.core.found_once import found_once
from sparsetrain.surgery.method import RowFacts
from sparsetrain.surgery.outermost import declass_model, reclass_model
from sparsetrain.surgery.reclass import declass, dense_forward, reclass

ROWS = "dense_rows"
"""The argument by which a block is given its dense rows, bool [b, t], in a forward that has any."""
IGNORED = -100
SHIFTED = "shift_labels"
"""What collators call labels that stand at the position that predicts them."""
_CELL = "dense_row_cell"
_Change = Callable[[Any, Any], None]
_OUTSIDE = (
    "dense_tokens='targets': a block is called while gradients are computed, outside of its model's forward, so its "
    "targets are not known. Call the model; for gradient checkpointing, turn it on with the model's "
    "gradient_checkpointing_enable() instead of checkpointing blocks from outside."
)


def predicted(given: dict[str, Any], causal: bool) -> Tensor | None:
    """The label that each position predicts, [b, t]; labels of another shape, and None, as they are."""
    if given.get(SHIFTED) is not None:
        return given[SHIFTED]
    labels = given.get("labels")
    if labels is None or not causal or labels.ndim != 2:
        return labels
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


class DenseRows:
    """Which rows run dense now; one for a model, its blocks and its sites.

    Args:
        causal: position p predicts token p + 1.

    Attributes:
        running: a training forward of the model runs, so its targets are known.
        now: bool [b, t], or None: no row is dense.
        share: of the rows of the last training forward that were dense, padding counted; 0 before the first.
    """

    def __init__(self, causal: bool) -> None:
        self.causal = causal
        self.share: Tensor | float = 0.0
        self.running = False
        self.now: Tensor | None = None

    @property
    def everywhere(self) -> bool:
        """Is every row dense now?"""
        rows = self.now
        return rows is not None and found_once(rows, "all", lambda: bool(rows.all()))

    def of(self, num_rows: int) -> Tensor | None:
        """The dense rows of a site that is given `num_rows` rows, bool [b, t]; None if no row is dense.

        Raises:
            ValueError: they are of another batch.
        """
        rows = self.now
        if rows is None or not found_once(rows, "any", lambda: bool(rows.any())):
            return None
        if rows.numel() != num_rows:
            raise ValueError(
                f"dense_tokens='targets': the labels tell the targets of {tuple(rows.shape)} tokens, and a layer was "
                f"given {num_rows} rows. Give one label for each token that the model reads."
            )
        return rows


class SeesTargets:
    """Mixed into a model: in a training forward, rows that predict a label are the dense ones."""

    height = 1  # others may set labels aside
    dense_row_cell: DenseRows

    def around(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `forward`; see `surgery.outermost`."""
        cell = self.dense_row_cell
        if cell.running or not self.training:  # type: ignore[attr-defined]
            return forward(*args, **kwargs)
        cell.now, cell.running = self._targets(args, kwargs), True
        cell.share = 0.0 if cell.now is None else cell.now.float().mean()
        try:
            return forward(*args, **kwargs)
        finally:
            cell.now, cell.running = None, False

    def _targets(self, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        names = list(inspect.signature(type(self).forward).parameters)[1:]  # type: ignore[attr-defined]
        given = dict(zip(names, args, strict=False)) | kwargs
        label_bt = predicted(given, self.dense_row_cell.causal)
        if label_bt is None and not torch.is_grad_enabled():
            return None
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if label_bt is None or tokens is None or label_bt.shape != tokens.shape[:2]:
            found = "no labels" if label_bt is None else f"labels of shape {tuple(label_bt.shape)}"
            raise ValueError(
                f"dense_tokens='targets' runs the tokens dense that have a label, and {type(self).__name__} was given "
                f"{found} in training. Let the model see one label a token (no compute_loss_func and no "
                "label_smoothing_factor in a Trainer), or set dense_tokens='none'."
            )
        return label_bt != IGNORED


class TakesDenseRows:
    """Mixed into a block: its sites see the dense rows of the forward that it belongs to."""

    height = -1  # token selection gives the rows of each of its passes
    dense_row_cell: DenseRows

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # An argument, and given outside of `forward`: gradient checkpointing, which wraps the forward, hands the same
        # rows to the recomputation.
        cell = self.dense_row_cell
        if cell.running and cell.now is not None:
            kwargs[ROWS] = cell.now
        elif not cell.running and self.training and torch.is_grad_enabled():  # type: ignore[attr-defined]
            raise RuntimeError(_OUTSIDE)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def forward(self, *args: Any, dense_rows: Tensor | None = None, **kwargs: Any) -> Any:
        cell = self.dense_row_cell
        before, cell.now = cell.now, dense_rows
        try:
            return dense_forward(TakesDenseRows, self, *args, **kwargs)
        finally:
            cell.now = before


def refuse_rows(config: Any, facts: RowFacts) -> str | None:
    """Why a config with `dense_tokens` cannot train on rows, or None."""
    if config.dense_tokens == "none" or (facts.one_sequence and not facts.labelled):
        return None
    return (
        f"dense_tokens={config.dense_tokens!r} runs the tokens dense that have a label, and rows of task={facts.task} "
        "have no label a token. Set dense_tokens=none"
    )


def at_most_dense(config: Any, dense: Cost, sparse: Cost, choosing_flops: float) -> Cost:
    """What a config with `dense_tokens` costs at most; `sparse` without.

    How many tokens are targets is known to the rows alone. A target costs what it did, and at most what choosing for
    the others costs besides.
    """
    if config.dense_tokens == "none":
        return sparse
    saved = max(dense.saved_elements, sparse.saved_elements)
    return Cost(num_params=sparse.num_params, flops=dense.flops + choosing_flops, saved_elements=saved)


def see_targets(model: nn.Module, anatomy: Anatomy, name: str, site: Any, undo: Undo) -> Undo:
    """Let an installed site know the dense rows of every training forward, as its `dense_rows`.

    What it takes is shared with the other sites of its block and of its model.

    Args:
        name: of the site.
        undo: takes the site out.

    Returns: the undo of both.

    Raises:
        ValueError: the model's forward takes no labels, or something here is not ours to change. The site is out then.
    """
    outer, undos = submodule(model, anatomy.model), [undo]
    block = next(each.name for each in anatomy.blocks if f"{name}.".startswith(f"{each.name}."))

    def undo_all() -> None:
        while undos:
            undos.pop()()

    try:
        if "labels" not in inspect.signature(type(outer).forward).parameters:
            raise ValueError(
                f"dense_tokens='targets' finds targets by their labels, and {type(outer).__name__} takes none. Load "
                "the model with its head, or set dense_tokens='none'."
            )
        cell = vars(outer).get(_CELL) or DenseRows(all(each.causal for each in anatomy.attentions))
        undos.append(_join(outer, cell, SeesTargets, reclass_model, declass_model))
        undos.append(_join(submodule(model, block), cell, TakesDenseRows, reclass, declass))
    except ValueError:
        undo_all()
        raise
    site.dense_rows = cell
    return undo_all


def _join(
    module: nn.Module, cell: DenseRows, mixin: type, enter: Callable[..., None], leave: Callable[..., None]
) -> Undo:
    """Mix in what gives a module the cell, if nobody has; the last one to leave takes it out."""
    own = vars(module)
    if not isinstance(module, mixin):
        enter(module, mixin)
        own[_CELL], own[f"{_CELL}_users"] = cell, 0
    own[f"{_CELL}_users"] += 1

    def undo() -> None:
        own[f"{_CELL}_users"] -= 1
        if not own[f"{_CELL}_users"]:
            del own[_CELL], own[f"{_CELL}_users"]
            leave(module, mixin)

    return undo
