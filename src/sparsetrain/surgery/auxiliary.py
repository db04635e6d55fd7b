"""Auxiliary losses that count exactly once, whatever gradient checkpointing does, and as much as the task loss does.

Returning a loss from deep inside a model needs a change in its forward; collecting it in a list counts it twice when
the forward is recomputed. So the loss rides on the data path: `attach_loss(y, loss, …)` is y, and its backward sends a
gradient to the loss. A recomputed forward that is thrown away sends nothing.

That gradient is what the task loss is multiplied by: a gradient scaler's 65,536, or 1 / gradient accumulation steps. A
loop of one's own tells nobody. But autograd brings it: it's the gradient that arrives at the model's loss, and it
arrives there before any block of the model runs its backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import Undo
from sparsetrain.core.autograd import as_output
from sparsetrain.surgery.outermost import declass_model, reclass_model

IGNORED = -100


class LossScale:
    """The factor on a model's auxiliary losses.

    Attributes:
        factor: of the forward that runs, a scalar tensor that is filled in before it is used. 1 where nothing is known:
            the loss is computed outside of the model, of its logits.
    """

    def __init__(self) -> None:
        self._told: float | None = None
        self.factor = torch.ones(())

    def tell(self, factor: float | None) -> None:
        """What `handle.step` was told: None to go by the gradient of the model's loss."""
        self._told = factor
        self.factor = torch.tensor(1.0 if factor is None else factor)

    def begin(self, device: torch.device) -> None:
        """A forward begins. Its factor is a tensor of its own: a loss may be the sum of several forwards'."""
        self.factor = torch.full((), 1.0 if self._told is None else self._told, device=device)

    def follow(self, loss: Tensor, share: Tensor | float) -> None:
        """Let the factor of the forward that ends be the gradient of its loss, unless another was told.

        Args:
            share: of the step's loss that this forward's is, where that is known.
        """
        factor = self.factor

        def arrives(gradient: Tensor) -> None:
            self.factor = factor  # a block that is run again in this backward attaches its loss anew
            factor.data.copy_(gradient * share)  # no new version: autograd holds it, unread until now

        if self._told is None:
            loss.register_hook(arrives)


class KnowsLossScale:
    """Mixed into a model that has auxiliary losses."""

    loss_scales: list[LossScale]
    extra_arguments = ()

    def around(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `forward`; see `surgery.outermost`."""
        if not (self.training and torch.is_grad_enabled()):  # type: ignore[attr-defined]
            return forward(*args, **kwargs)
        _begin(self)
        out = forward(*args, **kwargs)
        _follow(self, out, kwargs.get("labels"), kwargs.get("num_items_in_batch"))
        return out


@torch.compiler.disable()
def _begin(model: Any) -> None:
    device = next(model.parameters()).device
    for scale in model.loss_scales:
        scale.begin(device)


@torch.compiler.disable()
def _follow(model: Any, out: Any, labels: Any, items: Any) -> None:
    loss = out[0] if isinstance(out, tuple) and labels is not None else getattr(out, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        return
    share: Tensor | float = 1.0
    if items is not None and isinstance(labels, Tensor):  # the loss is divided by the targets of the whole step
        share = ((labels != IGNORED).sum() / items).to(loss.device)
    for scale in model.loss_scales:
        scale.follow(loss, share)


def scale_losses(model: nn.Module, scale: LossScale) -> Undo:
    """Let a model's forward tell `scale` of its loss's gradient; returns the undo."""
    held: list[LossScale] = vars(model).setdefault("loss_scales", [])
    if not held:
        reclass_model(model, KnowsLossScale)
    held.append(scale)

    def undo() -> None:
        held.remove(scale)
        if not held:
            declass_model(model, KnowsLossScale)
            del vars(model)["loss_scales"]

    return undo


@torch.library.custom_op("sparsetrain::read_late", mutates_args=())
def _read_late(factor: Tensor, after: Tensor) -> Tensor:
    """A copy of `factor` as it is once `after` is there. Compiled, what a backward makes of the forward's tensors alone
    may be computed in the forward; this cannot."""
    return factor.clone()


@_read_late.register_fake
def _(factor: Tensor, after: Tensor) -> Tensor:
    return torch.empty_like(factor)


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, weight: float, factor: Tensor) -> Tensor:
        ctx.weight, ctx.dtype = weight, loss.dtype
        ctx.save_for_backward(factor)
        return as_output(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (dy,), (factor,) = grads, ctx.saved_tensors
        return dy, (_read_late(factor, dy).to(dy.device) * ctx.weight).to(ctx.dtype), None, None


def attach_loss(y: Tensor, loss: Tensor, weight: float, factor: Tensor) -> Tensor:
    """y, with `weight · factor · loss` added to whatever scalar is differentiated later.

    Args:
        y: any tensor that the main loss depends on.
        loss: a scalar.
        weight: of the loss.
        factor: scalar, read when the gradient is computed; see `LossScale`.
    """
    return _AttachLoss.apply(y, loss, weight, factor)  # type: ignore[return-value]
