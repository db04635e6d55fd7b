"""The loss of selected targets: which labels are left, the head on selected rows, and outputs of a loss head that sums.

A trainer counts the targets of an accumulated step before anything is selected, so that count is scaled by the share
that is selected; a loss that is only divided later (TRL's) is scaled the other way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.methods.token_selection.policies import IGNORED
from sparsetrain.methods.token_selection.selector import Head, Selector
from sparsetrain.ops.selected_loss import selected_loss
from sparsetrain.ops.selected_rows import Rows, take_rows
from sparsetrain.surgery.reclass import dense_forward

_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_PER_TOKEN = ("log_probs", "entropy", "is_top1")


class HeadOnRows:
    """Mixed into an output head: in a training forward, what the selection says answers for it."""

    selector: Selector

    def forward(self, x: Tensor) -> Tensor:
        head = self.selector.head
        return dense_forward(HeadOnRows, self, x) if head is None else head(x)


def head_of(model: Any) -> nn.Linear | None:
    """The output head, if it is a linear of ours and nothing is around it (an adapter)."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head if isinstance(head, HeadOnRows) and type(head).dense_class is nn.Linear else None  # type: ignore


def takes_rows(model: Any) -> bool:
    """Are the logits the head's linear and nothing else, so that it can run on selected rows?"""
    config = model.config.get_text_config() if hasattr(model, "config") else None
    return head_of(model) is not None and all(getattr(config, name, None) is None for name in _SCALES)


def selected_labels(labels: Tensor, rows: Rows, causal: bool) -> tuple[Tensor, Tensor, float]:
    """(labels without those that no selected position predicts, which were targets [b, t], share that is left)."""
    predicts = rows.selected_bt.to(labels.device)
    had = labels != IGNORED
    if causal:  # position p predicts label p + 1; nothing predicts the first
        predicts = F.pad(predicts[:, :-1], (1, 0), value=False)
        had = had & (torch.arange(labels.shape[1], device=labels.device) > 0)
    left = had & predicts
    return torch.where(left, labels, IGNORED), had, float(left.sum()) / max(1.0, float(had.sum()))


def only_used(target_bk: Tensor, rows: Rows) -> Tensor:
    used = rows.to(target_bk.device).used_bk
    return target_bk if used is None else torch.where(used, target_bk, IGNORED)


def shifted(labels: Tensor, causal: bool) -> Tensor:
    """What each position predicts."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED) if causal else labels


def rows_head(linear: nn.Linear, rows: Rows, causal: bool) -> Head:
    """The head on selected rows; a causal model's hands them on to the loss function, which is ours."""

    def head(hidden_btd: Tensor) -> Tensor:
        hidden_bkd = take_rows(hidden_btd, rows.to(hidden_btd.device))
        return hidden_bkd if causal else F.linear(hidden_bkd, linear.weight, linear.bias)

    return head


class RowsLoss:
    """A causal model's loss function on what `rows_head` hands on.

    Attributes:
        ran: it has been called; a trainer may compute its loss elsewhere.
    """

    def __init__(self, linear: nn.Linear, rows: Rows) -> None:
        self.linear, self.rows, self.ran = linear, rows, False

    def __call__(
        self, logits: Tensor, labels: Tensor, vocab_size: int | None = None, num_items_in_batch: Any = None, **_: Any
    ) -> Tensor:
        self.ran = True
        rows = self.rows.to(logits.device)
        target_bk = only_used(rows.gather(shifted(labels, causal=True)), rows)
        weight = None if rows.weight_bk is None else _normal(rows.weight_bk, target_bk).flatten()
        return selected_loss(
            logits.flatten(0, 1),
            self.linear.weight,
            target_bk.flatten(),
            bias_v=self.linear.bias,
            row_weight_n=weight,
            normaliser=num_items_in_batch,
        )


def _normal(weight_bk: Tensor, target_bk: Tensor) -> Tensor:
    """Importance weights that sum to the number of selected targets."""
    counted = weight_bk * (target_bk != IGNORED)
    return counted * ((target_bk != IGNORED).sum() / counted.sum().clamp(min=1e-6))


def as_if_all(out: Any, had_bt: Tensor, share: float) -> Any:
    """The output of a loss head that gives each token's log-probability and a mask (TRL's), for a caller who sums.

    He divides by the number of all targets, his own or the mask's. So the mask is that of all of them, and every
    selected token counts for 1 / share: the quotient is the mean over selected targets.
    """
    mask = getattr(out, "label_mask", None)
    if mask is None or getattr(out, "log_probs", None) is None:
        return out
    for name in _PER_TOKEN:
        value = getattr(out, name, None)
        if value is not None and share > 0:
            setattr(out, name, value / share)
    out.label_mask = had_bt[:, -mask.shape[1] :].to(mask.device)
    return out
