"""Scores of tokens for `policy=loss` and `gradient_norm`, from the hidden states before the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain.methods.token_selection.loss import head_of
from sparsetrain.ops.selected_loss import row_scores
from sparsetrain.surgery.targets import IGNORED


@torch.no_grad()
def scores_at_head(model: Any, hidden_btd: Tensor, target_bt: Tensor, policy: str) -> Tensor:
    """[b, t]: the loss of each token's prediction, or the norm of its gradient with respect to the head's weight.

    Tokens without a target score 0, less than any other. A scale that the model itself puts on its logits is left out,
    but for a soft cap. Logits exist in chunks of rows.

    Args:
        hidden_btd: what the head is given.
        target_bt: the label that each position predicts.
        policy: `loss` or `gradient_norm`.
    """
    head: Any = head_of(model)
    has_target = target_bt != IGNORED
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    loss_n, norm_n = row_scores(
        hidden_btd[has_target], head.weight, target_bt[has_target], bias_v=head.bias, softcap=cap
    )
    score_n = loss_n if policy == "loss" else norm_n
    return torch.zeros_like(target_bt, dtype=score_n.dtype).masked_scatter_(has_target, score_n)
