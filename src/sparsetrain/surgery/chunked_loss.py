"""A causal language model's training loss in chunks of rows: neither pass holds the logits of a whole batch.

The logits of SmolLM2 and their gradient are over half of the peak of a step of 2,048 tokens. Whoever compares a sparse
step with a dense one would use this on both sides, as TRL does by default.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.core.anatomy import submodule
from sparsetrain.core.sites import model_inside
from sparsetrain.ops.selected_loss import selected_loss
from sparsetrain.surgery.outermost import reclass_model
from sparsetrain.surgery.reclass import dense_forward, reclass

IGNORED = -100
_SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


class Chunks:
    """Shared by a model and its head. running: a training forward with labels runs now, and the head hands on."""

    def __init__(self, head: nn.Linear) -> None:
        self.head, self.running = head, False

    def loss(
        self, logits: Tensor, labels: Tensor, vocab_size: int | None = None, num_items_in_batch: Any = None, **more: Any
    ) -> Tensor:
        """transformers' ForCausalLMLoss, of hidden states [b, t, d] in place of logits."""
        target_bt = more.get("shift_labels")
        if target_bt is None:
            target_bt = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        return selected_loss(
            logits.flatten(0, 1),
            self.head.weight,
            target_bt.to(logits.device).flatten(),
            bias_v=self.head.bias,
            normaliser=num_items_in_batch,
        )


class HandsOn:
    """Mixed into an output head."""

    chunks: Chunks

    def forward(self, x: Tensor) -> Tensor:
        return x if self.chunks.running else dense_forward(HandsOn, self, x)


class LossInChunks:
    """Mixed into a causal language model; its training outputs with labels have no logits."""

    chunks: Chunks
    extra_arguments = ()

    def around(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `forward`; see `surgery.outermost`."""
        chunks = self.chunks
        trains = self.training and torch.is_grad_enabled()  # type: ignore[attr-defined]
        if chunks.running or not trains or kwargs.get("labels") is None:
            return forward(*args, **kwargs)
        chunks.running = True
        try:
            out = forward(*args, **kwargs)
        finally:
            chunks.running = False
        if hasattr(out, "logits"):
            out.logits = None
        return out

    @property
    def loss_function(self) -> Any:
        return self.chunks.loss if self.chunks.running else super().loss_function  # type: ignore[misc]

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        super(LossInChunks, type(self)).loss_function.fset(self, value)  # type: ignore[misc]


def use_chunked_loss(model: nn.Module) -> bool:
    """Let a causal language model, in an adapter or not, train on its loss in chunks; False where it cannot.

    It cannot where the logits are more than the head's linear, the loss is the model's own, or a method has both
    already.
    """
    inner: Any = submodule(model, model_inside(model))  # of families without sites, too
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    config = inner.config.get_text_config() if hasattr(inner, "config") else None
    if type(head) is not nn.Linear or {"forward", "_hf_hook"} & vars(head).keys():
        return False
    usual = "_loss_function" not in vars(inner) and getattr(inner.loss_function, "__name__", "") == "ForCausalLMLoss"
    if not usual or any(getattr(config, name, None) is not None for name in _SCALES):
        return False
    chunks = Chunks(head)
    reclass(head, HandsOn)
    vars(head)["chunks"] = chunks
    reclass_model(inner, LossInChunks)
    vars(inner)["chunks"] = chunks
    return True
