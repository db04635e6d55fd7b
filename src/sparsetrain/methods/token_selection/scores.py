"""Scores of tokens for `policy=loss` and `gradient_norm`, from one more forward without gradients.

It costs a forward, a third of a dense step's time or more; nothing is saved, and logits exist in chunks of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain.core.modes import evaluating
from sparsetrain.methods.token_selection.loss import head_of
from sparsetrain.methods.token_selection.selector import Selector
from sparsetrain.ops.selected_loss import row_scores
from sparsetrain.surgery.targets import IGNORED, SHIFTED, predicted


@torch.no_grad()
def token_scores(model: Any, given: dict[str, Any], policy: str) -> Tensor:
    """[b, t]: the loss of each token's prediction, or the norm of its gradient with respect to the head's weight.

    Tokens without a target score 0, less than any other. The model's dropout is off meanwhile. A scale that the model
    itself puts on its logits is left out, but for a soft cap.

    Args:
        model: converted with `TokenSelection`.
        given: arguments of its forward, by name.
        policy: `loss` or `gradient_norm`.

    Raises:
        ValueError: the batch has no label a token, or the model no linear head.
    """
    selector: Selector = model.selector
    target_bt, tokens = predicted(given, selector.causal), given.get("input_ids")
    if tokens is None:
        tokens = given.get("inputs_embeds")
    head = head_of(model)
    if target_bt is None or tokens is None or target_bt.shape != tokens.shape[:2] or head is None:
        raise ValueError(
            f"token_selection: policy={policy!r} scores the tokens of a language model by their labels, and "
            f"{type(model).__name__} was given {'no label' if target_bt is None else 'one label a row'}. "
            "Use policy=random or prefix."
        )
    hidden_btd = _head_input(model, {name: value for name, value in given.items() if name not in ("labels", SHIFTED)})
    has_target = target_bt != IGNORED
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    loss_n, norm_n = row_scores(
        hidden_btd[has_target], head.weight, target_bt[has_target], bias_v=head.bias, softcap=cap
    )
    score_n = loss_n if policy == "loss" else norm_n
    return torch.zeros_like(target_bt, dtype=score_n.dtype).masked_scatter_(has_target, score_n)


def _head_input(model: Any, given: dict[str, Any]) -> Tensor:
    """What the head is given; it computes nothing. Of the arguments, those that the dense forward names."""
    noted: list[Tensor] = []

    def note(hidden_btd: Tensor) -> Tensor:
        noted.append(hidden_btd)
        return hidden_btd

    names = model.argument_names()
    with evaluating(model), model.selector.head_is(note):
        model.forward(**{name: value for name, value in given.items() if name in names})
    (hidden_btd,) = noted
    return hidden_btd
