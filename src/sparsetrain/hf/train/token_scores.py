"""Scores of tokens for `policy=loss` and `gradient_norm`, from one more forward without gradients.

It costs a forward, a third of a dense step's time or more; nothing is saved, and logits exist in chunks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.core.modes import evaluating
from sparsetrain.methods.token_selection.policies import IGNORED
from sparsetrain.ops.selected_loss import row_scores


@torch.no_grad()
def token_scores(model: Any, batch: dict[str, Any], policy: str, causal: bool) -> Tensor:
    """[b, t]: the loss of each token's prediction, or the norm of its gradient with respect to the head's weight.

    Tokens without a target score 0, less than any other. The model's dropout is off meanwhile. A scale that the model
    itself puts on its logits is left out, but for a soft cap.

    Raises:
        ValueError: the batch has no label a token, or the model no linear head.
    """
    labels, ids = batch.get("labels"), batch.get("input_ids")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if labels is None or ids is None or labels.shape != ids.shape or type(head) is not nn.Linear:
        raise ValueError(
            f"token_selection: policy={policy!r} scores the tokens of a language model by their labels, and "
            f"{type(model).__name__} was given {'no label' if labels is None else 'one label a row'}. "
            "Use policy=random or prefix."
        )
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "token_scores")}
    with evaluating(model), _noted_inputs(head) as noted:
        model(**inputs)
    (hidden_btd,) = noted
    target_bt = F.pad(labels[:, 1:], (0, 1), value=IGNORED) if causal else labels
    has_target = target_bt != IGNORED
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    loss_n, norm_n = row_scores(
        hidden_btd[has_target], head.weight, target_bt[has_target], bias_v=head.bias, softcap=cap
    )
    score_n = loss_n if policy == "loss" else norm_n
    return torch.zeros_like(target_bt, dtype=score_n.dtype).masked_scatter_(has_target, score_n)


@contextmanager
def _noted_inputs(head: nn.Linear) -> Iterator[list[Tensor]]:
    """Inside, the head computes nothing and notes what it is given."""
    noted: list[Tensor] = []

    def note(hidden_btd: Tensor) -> Tensor:
        noted.append(hidden_btd)
        return hidden_btd

    vars(head)["forward"] = note
    try:
        yield noted
    finally:
        del vars(head)["forward"]
