"""Token selection in a training step: labels of other tokens are set aside, and the loss head runs on selected rows.

The Trainer counts the targets of an accumulated step before anything is selected, so the count is scaled by the share
that is selected. Evaluation is never touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.methods.token_selection.module import SelectedBlock, Selector
from sparsetrain.methods.token_selection.policies import IGNORED
from sparsetrain.ops.selected_loss import selected_loss
from sparsetrain.ops.selected_rows import Rows, take_rows
from sparsetrain.surgery.apply import Handle

_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


def selector_of(handle: Handle) -> Selector | None:
    """The selection that a converted model's blocks share; None when the recipe selects no tokens."""
    return next((m.selector for m in handle._installed.values() if isinstance(m, SelectedBlock)), None)


@contextmanager
def selecting(handle: Handle, batch: dict[str, Any], num_items: Any = None) -> Iterator[dict[str, Any]]:
    """One training forward on selected tokens: `with selecting(handle, batch) as chosen: loss = model(**chosen).loss`.

    The selection is drawn here, with the labels in sight. Inside the block the model's loss is that of selected
    targets, divided by their number, and the head computes no other row; its `logits` are then not to be read.

    Args:
        handle: of a model converted with `TokenSelection`.
        batch: arguments of the model's forward.
        num_items: targets of the whole accumulated step before selection, where the loss is divided by that.

    Raises:
        ValueError: the policy needs labels or scores that the batch has not; a sample is shorter than `num_tokens`.
    """
    selector = selector_of(handle)
    if selector is None or not handle.model.training or not torch.is_grad_enabled():
        yield batch if num_items is None else {**batch, "num_items_in_batch": num_items}
        return
    rows = selector.prepare(batch)
    chosen = {name: value for name, value in batch.items() if name != "token_scores"}
    labels = batch.get("labels")
    per_token = labels is not None and labels.shape == batch["input_ids"].shape
    if labels is not None and per_token:
        chosen["labels"], share = _selected_labels(labels, rows, selector.causal)
        num_items = None if num_items is None else num_items * share
    if num_items is not None:
        chosen["num_items_in_batch"] = num_items
    with _head_on(handle.model, rows, selector.causal) if per_token else _nothing():
        yield chosen


def select_tokens(trainer: Any, handle: Handle) -> None:
    """Let a Trainer (of transformers or TRL) train on selected tokens; call it once the trainer is made.

    Raises:
        ValueError: the recipe selects no tokens.
    """
    if selector_of(handle) is None:
        raise ValueError(
            f"the recipe {[c.method for c in handle.configs]} has no token_selection. Add TokenSelection()."
        )
    compute = trainer.compute_loss

    def compute_loss(
        model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with selecting(handle, inputs, num_items_in_batch) as chosen:
            count = chosen.pop("num_items_in_batch", None)
            return compute(model, chosen, return_outputs=return_outputs, num_items_in_batch=count)

    trainer.compute_loss = compute_loss


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _selected_labels(labels: Tensor, rows: Rows, causal: bool) -> tuple[Tensor, float]:
    """(labels without those that no selected position predicts, share of the targets that is left)."""
    predicts = rows.selected_bt.to(labels.device)
    if causal:  # position p predicts label p + 1; nothing predicts the first
        predicts = torch.nn.functional.pad(predicts[:, :-1], (1, 0), value=False)
    had = labels != IGNORED
    if causal:
        had = had & (torch.arange(labels.shape[1], device=labels.device) > 0)
    left = had & predicts
    return torch.where(left, labels, IGNORED), float(left.sum()) / max(1.0, float(had.sum()))


def shifted(labels: Tensor, causal: bool) -> Tensor:
    """What each position predicts."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED) if causal else labels


@contextmanager
def _head_on(model: Any, rows: Rows, causal: bool) -> Iterator[None]:
    """Inside: the head hands hidden states of selected rows on to the loss function, which is ours."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    config = model.config.get_text_config() if hasattr(model, "config") else None
    if type(head) is not nn.Linear or any(getattr(config, name, None) is not None for name in _SCALES):
        yield
        return
    linear: nn.Linear = head

    def pass_rows(hidden_btd: Tensor) -> Tensor:
        return take_rows(hidden_btd, rows.to(hidden_btd.device))

    def loss_function(
        logits: Tensor, labels: Tensor, vocab_size: int | None = None, num_items_in_batch: Any = None, **_: Any
    ) -> Tensor:
        here = rows.to(logits.device)
        target_bk = here.gather(shifted(labels, causal))
        if here.used_bk is not None:
            target_bk = torch.where(here.used_bk, target_bk, IGNORED)
        weight = None if here.weight_bk is None else _normal(here.weight_bk, target_bk).flatten()
        return selected_loss(
            logits.flatten(0, 1),
            linear.weight,
            target_bk.flatten(),
            bias_v=linear.bias,
            row_weight_n=weight,
            normaliser=num_items_in_batch,
        )

    before = vars(model).get("_loss_function")
    vars(linear)["forward"] = pass_rows
    model._loss_function = loss_function
    try:
        yield
    finally:
        del vars(linear)["forward"]
        if before is None:
            del model._loss_function
        else:
            model._loss_function = before


def _normal(weight_bk: Tensor, target_bk: Tensor) -> Tensor:
    """Importance weights that sum to the number of selected targets."""
    counted = weight_bk * (target_bk != IGNORED)
    return counted * ((target_bk != IGNORED).sum() / counted.sum().clamp(min=1e-6))
