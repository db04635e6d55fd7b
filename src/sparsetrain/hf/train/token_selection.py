"""Token selection in a training step: labels of other tokens are set aside, and the loss head runs on selected rows.

The Trainer counts the targets of an accumulated step before anything is selected, so the count is scaled by the share
that is selected. Evaluation is never touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.hf.train.token_scores import token_scores
from sparsetrain.measure.memory import saved_activations
from sparsetrain.methods.token_selection.module import SelectedBlock, Selector
from sparsetrain.methods.token_selection.policies import IGNORED
from sparsetrain.ops.selected_loss import selected_loss
from sparsetrain.ops.selected_rows import Rows, take_rows
from sparsetrain.surgery.apply import Handle

_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


def selector_of(handle: Handle) -> Selector | None:
    """The selection that a converted model's blocks share; None when the recipe selects no tokens."""
    return next((m.selector for _, m in handle.installed if isinstance(m, SelectedBlock)), None)


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
        ValueError: the policy needs labels or scores that the batch has not; a sample is shorter than `num_tokens`;
            `unbiased` with a model whose loss cannot be weighted.
    """
    selector = selector_of(handle)
    if selector is None or not handle.model.training or not torch.is_grad_enabled():
        yield batch if num_items is None else {**batch, "num_items_in_batch": num_items}
        return
    if selector.config.policy in ("loss", "gradient_norm") and "token_scores" not in batch:
        batch = {**batch, "token_scores": token_scores(handle.model, batch, selector.config.policy, selector.causal)}
    rows = selector.prepare(batch)
    chosen = {name: value for name, value in batch.items() if name != "token_scores"}
    labels = batch.get("labels")
    per_token = labels is not None and labels.shape == batch["input_ids"].shape
    if labels is not None and per_token:
        chosen["labels"], share = _selected_labels(labels, rows, selector.causal)
        num_items = None if num_items is None else num_items * share
    if num_items is not None:
        chosen["num_items_in_batch"] = num_items
    if labels is not None and per_token and not selector.causal:
        # the losses of masked language models are written into their forwards: they are given fewer rows of both
        chosen["labels"] = _only_used(rows.to(labels.device).gather(chosen["labels"]), rows)
    weighed: list[bool] = []
    head = _head_on(handle.model, rows, selector.causal, weighed) if per_token else nullcontext()
    with head:
        yield chosen
    if rows.weight_bk is not None and not weighed:
        raise ValueError(
            "token_selection: unbiased=True weighs the loss of each selected target, and the loss of "
            f"{type(handle.model).__name__} with this trainer is not computed where it can be weighed. Use "
            "unbiased=False, or train a causal language model with transformers' Trainer."
        )


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


def _selected_labels(labels: Tensor, rows: Rows, causal: bool) -> tuple[Tensor, float]:
    """(labels without those that no selected position predicts, share of the targets that is left)."""
    predicts = rows.selected_bt.to(labels.device)
    if causal:  # position p predicts label p + 1; nothing predicts the first
        predicts = F.pad(predicts[:, :-1], (1, 0), value=False)
    had = labels != IGNORED
    if causal:
        had = had & (torch.arange(labels.shape[1], device=labels.device) > 0)
    left = had & predicts
    return torch.where(left, labels, IGNORED), float(left.sum()) / max(1.0, float(had.sum()))


def _only_used(target_bk: Tensor, rows: Rows) -> Tensor:
    used = rows.to(target_bk.device).used_bk
    return target_bk if used is None else torch.where(used, target_bk, IGNORED)


def shifted(labels: Tensor, causal: bool) -> Tensor:
    """What each position predicts."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED) if causal else labels


@contextmanager
def _head_on(model: Any, rows: Rows, causal: bool, weighed: list[bool]) -> Iterator[None]:
    """Inside: the head runs on selected rows; a causal model's hands them on to the loss function, which is ours.

    Args:
        weighed: is told when our loss function has run.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    config = model.config.get_text_config() if hasattr(model, "config") else None
    if type(head) is not nn.Linear or any(getattr(config, name, None) is not None for name in _SCALES):
        yield
        return
    linear: nn.Linear = head

    def pass_rows(hidden_btd: Tensor) -> Tensor:
        hidden_bkd = take_rows(hidden_btd, rows.to(hidden_btd.device))
        return hidden_bkd if causal else F.linear(hidden_bkd, linear.weight, linear.bias)

    if not causal:
        vars(linear)["forward"] = pass_rows
        try:
            yield
        finally:
            del vars(linear)["forward"]
        return

    def loss_function(
        logits: Tensor, labels: Tensor, vocab_size: int | None = None, num_items_in_batch: Any = None, **_: Any
    ) -> Tensor:
        weighed.append(True)
        here = rows.to(logits.device)
        target_bk = _only_used(here.gather(shifted(labels, causal)), here)
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


@dataclass(frozen=True, kw_only=True)
class SavedShare:
    """Saved activation bytes of the blocks as a share of the dense blocks', measured and by the formula.

    formula = r + (1 - r)·κ; `ratio` is r, what is selected; `kv_share` is κ, keys and values in the dense bytes.
    """

    found: float
    formula: float
    ratio: float
    kv_share: float

    def __str__(self) -> str:
        return (
            f"Token selection: blocks save {self.found:.3f} of what dense blocks save; the formula r + (1 - r)κ gives "
            f"{self.formula:.3f} with r = {self.ratio:.3f} of the tokens selected and κ = {self.kv_share:.3f} "
            "the share of keys and values."
        )


def saved_share(handle: Handle, model: Any, batch: dict[str, Tensor]) -> SavedShare | None:
    """Measure a converted model against the formula, on the 256 first tokens of one row.

    Returns: None where the formula does not speak: no token selection, other methods beside it, checkpointed blocks, a
        row that begins with padding.
    """
    selector = selector_of(handle)
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if selector is None or len(handle.configs) > 1 or recomputes:
        return None
    t = batch["input_ids"].shape[1]
    short = {n: x[:1, :256] if x.shape[1:] == (t,) else x[:1] for n, x in batch.items()}
    if "attention_mask" in short and not short["attention_mask"][0, 0]:
        return None

    def blocks(rows: Rows | None) -> float:
        with selecting(handle, short) as chosen, nullcontext() if rows is None else selector.using(rows):
            inputs = {name: value for name, value in chosen.items() if name != "labels"}
            saved = saved_activations(model, lambda: model(**inputs).logits.float().sum())
        return float(sum(sum(layer.values()) for layer in saved.by_layer.values()))

    length = short["input_ids"].shape[1]
    config, selector.config = selector.config, replace(selector.config, unbiased=False)  # there is no loss to weigh
    try:
        selected = blocks(None)
        floor = sum(m.stats()["key_value_bytes"] for _, m in handle.installed)
        assert selector.rows is not None
        r = selector.rows.shape[1] / length
        dense = blocks(Rows.of([torch.arange(length)], length))
    finally:
        selector.config = config
    kv = floor / dense
    return SavedShare(found=selected / dense, formula=r + (1 - r) * kv, ratio=r, kv_share=kv)
