"""The loss of selected targets: which labels are left, the head on selected rows, and outputs of a loss head that sums.

A trainer divides by the targets that it counted before anything was selected; `step.StepMean` makes that those that
are selected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.core.backend import Ran
from sparsetrain.methods.token_selection.logits import LogitsOnDemand
from sparsetrain.methods.token_selection.selector import Head, Selector
from sparsetrain.ops.selected_loss import selected_loss
from sparsetrain.ops.selected_rows import Rows, take_rows
from sparsetrain.surgery.reclass import dense_forward
from sparsetrain.surgery.site import watching
from sparsetrain.surgery.targets import IGNORED, SHIFTED, predicted

_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
_PER_TOKEN = ("entropy", "is_top1")
Finish = Callable[..., Tensor]
"""Makes a micro-batch's loss its share of the step's mean."""


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


def has_usual_loss(model: Any, own: Any) -> bool:
    """Is the model's loss function the cross-entropy of causal models, and nobody's own?"""
    return "_loss_function" not in vars(model) and getattr(own, "__name__", "") == "ForCausalLMLoss"


@dataclass(frozen=True, eq=False)
class Targets:
    """The targets of a batch, bool [b, t] by the position that predicts them, and those that are selected."""

    had_bt: Tensor
    left_bt: Tensor

    @cached_property
    def counts(self) -> tuple[int, int]:
        """(selected, all); the device is asked once."""
        selected, all_of_them = torch.stack((self.left_bt.sum(), self.had_bt.sum())).tolist()
        return selected, all_of_them


def targets_of(given: dict[str, Any], rows: Rows, causal: bool) -> Targets | None:
    """Which targets a forward with these arguments has; None without a label a token."""
    target_bt = predicted(given, causal)
    if target_bt is None or target_bt.shape != (len(rows.counts), rows.num_tokens):
        return None
    had_bt = target_bt != IGNORED
    return Targets(had_bt, had_bt & rows.selected_bt.to(had_bt.device))


def only_selected(given: dict[str, Any], targets: Targets, causal: bool) -> dict[str, Any]:
    """The arguments with the labels of selected targets alone."""
    changed: dict[str, Any] = {}
    if given.get(SHIFTED) is not None:
        changed[SHIFTED] = given[SHIFTED].where(targets.left_bt, IGNORED)
    if given.get("labels") is not None:
        left_bt = F.pad(targets.left_bt[:, :-1], (1, 0), value=False) if causal else targets.left_bt
        changed["labels"] = given["labels"].where(left_bt, IGNORED)
    return given | changed


def only_used(target_bk: Tensor, rows: Rows) -> Tensor:
    used = rows.to(target_bk.device).used_bk
    return target_bk if used is None else torch.where(used, target_bk, IGNORED)


def rows_head(linear: nn.Linear, rows: Rows, causal: bool, logits: LogitsOnDemand) -> Head:
    """The head on selected rows; a causal model's hands them on to the loss function, which is ours."""

    def head(hidden_btd: Tensor) -> Tensor:
        logits.hidden_btd = hidden_btd
        hidden_bkd = take_rows(hidden_btd, rows.to(hidden_btd.device))
        return hidden_bkd if causal else F.linear(hidden_bkd, linear.weight, linear.bias)

    return head


class RowsLoss:
    """A causal model's loss function on what `rows_head` hands on.

    Attributes:
        ran: it has been called; a trainer may compute its loss elsewhere.
        backends: notes who ran it.
    """

    weighs = True

    def __init__(self, linear: nn.Linear, rows: Rows, finish: Finish, backends: Ran) -> None:
        self.linear, self.rows, self.finish, self.ran, self.backends = linear, rows, finish, False, backends

    def __call__(
        self, logits: Tensor, labels: Tensor, vocab_size: int | None = None, num_items_in_batch: Any = None, **more: Any
    ) -> Tensor:
        self.ran = True
        rows = self.rows.to(logits.device)
        target_bt = predicted({"labels": labels, SHIFTED: more.get(SHIFTED)}, causal=True)
        assert target_bt is not None
        target_bk = only_used(rows.gather(target_bt), rows)
        weight, normaliser = None, num_items_in_batch
        if rows.weight_bk is not None:  # the mean is then a weighted one
            weight = (rows.weight_bk * (target_bk != IGNORED)).flatten()
            normaliser = weight.sum().clamp(min=1e-6) if normaliser is None else normaliser
        with watching(self.backends):
            loss = selected_loss(
                logits.flatten(0, 1),
                self.linear.weight,
                target_bk.flatten(),
                bias_v=self.linear.bias,
                row_weight_n=weight,
                normaliser=normaliser,
            )
        return self.finish(loss, weight=weight)


class OwnLoss:
    """A model's own loss function, on labels of selected targets alone; zero where there are none."""

    weighs = False

    def __init__(self, own: Callable[..., Tensor], empty: bool, finish: Finish) -> None:
        self.own, self.empty, self.finish, self.ran = own, empty, finish, False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.ran = True
        logits = args[0] if args else kwargs["logits"]
        return self.finish(logits.float().sum() * 0.0 if self.empty else self.own(*args, **kwargs))


def of_every_target(out: Any, targets: Targets) -> Any:
    """The output of a loss head that gives each token's log-probability (TRL's), for a caller whose loss is no sum over
    tokens: he compares those of whole samples (DPO, KTO), or each with an older one (GRPO).

    Every target keeps its exact log-probability, and selected ones have a gradient: Σ_i g_i ∇log p_i of a sample's n
    targets becomes n / |S| · Σ_{i ∈ S} g_i ∇log p_i, its estimate from those that are selected.
    """
    places = out.label_mask.shape[1]
    had_bt, left_bt = (bt[:, :places].to(out.log_probs.device) for bt in (targets.had_bt, targets.left_bt))
    weight_bt = left_bt * (had_bt.sum(1, keepdim=True) / left_bt.sum(1, keepdim=True).clamp(min=1))
    value_bt = out.log_probs.detach()
    out.log_probs = value_bt + (out.log_probs - value_bt) * weight_bt.to(value_bt.dtype)
    return out


def as_if_all(out: Any, targets: Targets, finish: Finish | None) -> Any:
    """The output of a loss head that gives each token's log-probability and a mask (TRL's), for a caller who sums.

    He divides by the number of all targets, his own or the mask's. So the mask is that of all of them, and every
    selected token counts for 1 / share: the quotient is the mean over selected targets.

    Args:
        finish: for log-probabilities that are summed over a whole step; None: over this micro-batch.
    """
    mask = out.label_mask
    had_bt = targets.had_bt[:, : mask.shape[1]].to(mask.device)
    selected, all_of_them = targets.counts
    for name in _PER_TOKEN:
        value = getattr(out, name, None)
        if value is not None and selected:
            setattr(out, name, value * (all_of_them / selected))
    if finish is not None:
        out.log_probs = finish(out.log_probs, spread=had_bt)
    elif selected:
        out.log_probs = out.log_probs * (all_of_them / selected)
    out.label_mask = had_bt
    return out
