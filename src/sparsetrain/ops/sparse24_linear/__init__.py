"""A linear with a 2:4 weight and a dense master: three products, of which two or three can be sparse.

FST (arXiv 2404.01847, section 3) and S-STE (arXiv 2409.09099, section 5).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsetrain.core.config import one_of
from sparsetrain.core.errors import Unsupported
from sparsetrain.ops.mvue24 import mvue24
from sparsetrain.ops.sparse24_linear.packing import Packed as Packed
from sparsetrain.ops.sparse24_linear.packing import available as available
from sparsetrain.ops.sparse24_linear.packing import compress, multiply_backward, multiply_forward
from sparsetrain.ops.sparse24_linear.packing import pack as pack

WGRADS = ("dense", "mvue")


def sparse24_linear(
    x: Tensor,
    weight: Tensor,
    packed: Packed,
    bias: Tensor | None = None,
    *,
    wgrad: str = "dense",
    generator: torch.Generator | None = None,
) -> Tensor:
    """y = x W̃ᵀ + b; dX = dY W̃; dW = dYᵀ X, or MVUE(dYᵀ) X: dense, unmasked, given to the master weight W.

    Equals: F.linear(x, W + (W̃ − W).detach(), b) with `wgrad="dense"`.

    Args:
        x: [..., in].
        weight: the dense master W; it takes the gradient and its values are not read.
        packed: `pack(W̃)`: M∘W of FST, or β·S(W) of S-STE. It decides the backend.
        bias: [out] or None.
        wgrad: `dense`, or `mvue`: dYᵀ drawn 2:4 in groups of four consecutive tokens, for each output channel. Fewer
            than four tokens in a call stay dense.
        generator: for `mvue`; read in the backward, so recomputation in the forward takes nothing from it.

    Returns:
        y [..., out], in x's dtype, or autocast's.

    Raises:
        ValueError: sizes that do not fit, an unknown `wgrad`.
        Unsupported: a compressed weight meets activations of another dtype.
    """
    one_of("sparse24_linear", "wgrad", wgrad, WGRADS)
    in_dim, out_dim = (0, 1) if packed.transposed else (1, 0)
    if x.shape[-1] != weight.shape[in_dim]:
        raise ValueError(
            f"sparse24_linear: x has {x.shape[-1]} channels and the weight {tuple(weight.shape)} takes "
            f"{weight.shape[in_dim]}. Pass x [..., in]; set transposed in pack() for weights stored [in, out]."
        )
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if packed.backend != "emulate" and packed.dtype != dtype:
        raise Unsupported(
            f"'sparse24_linear' packed the weight as {packed.dtype} and the activations are {dtype}. "
            "Train under autocast of that dtype, or in it, or use backend='emulate'."
        )
    with torch.autocast(device, enabled=False):
        x_ti = x.reshape(-1, x.shape[-1]).to(dtype)
        cast_bias = None if bias is None else bias.to(dtype)
        y_to = _Linear.apply(x_ti, weight, cast_bias, packed, wgrad, generator)
    return y_to.view(*x.shape[:-1], weight.shape[out_dim])  # type: ignore[union-attr]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ti: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        packed: Packed,
        wgrad: str,
        generator: torch.Generator | None,
    ) -> Tensor:
        forward, backward = packed.forward, packed.backward
        if packed.backend == "emulate" and forward.dtype != x_ti.dtype:
            forward = backward = forward.to(x_ti.dtype)
        ctx.packed, ctx.wgrad, ctx.generator, ctx.weight_dtype = packed, wgrad, generator, weight.dtype
        ctx.save_for_backward(x_ti if ctx.needs_input_grad[1] else None, backward if ctx.needs_input_grad[0] else None)
        return multiply_forward(x_ti, packed, forward, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (dy_to,) = grads
        x_ti, operand = ctx.saved_tensors
        packed: Packed = ctx.packed
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = multiply_backward(dy_to, packed, operand)
        if ctx.needs_input_grad[1]:
            dw = _weight_gradient(dy_to, x_ti, ctx.wgrad, ctx.generator, packed).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            db = dy_to.sum(0)
        return dx, dw, db, None, None, None


def wgrad_refusal(tokens: int, out_features: int) -> str | None:
    """Why the drawn dYᵀ [out, tokens] meets X in a dense product, of the same values; None where it is a sparse one."""
    if tokens % 64 == 0 and out_features % 64 == 0:
        return None
    return f"dYᵀ is {out_features}x{tokens} (outputs x tokens of a forward), and both must be multiples of 64"


def _weight_gradient(
    dy_to: Tensor, x_ti: Tensor, wgrad: str, generator: torch.Generator | None, packed: Packed
) -> Tensor:
    """dYᵀ X in the layout of the weight; with `mvue` a sparse product where a kernel takes the shape."""
    if wgrad == "mvue" and len(dy_to) >= 4:
        dy_to = mvue24(dy_to, 0, generator=generator)
        if packed.backend != "emulate" and wgrad_refusal(len(dy_to), dy_to.shape[1]) is None:
            dw_oi = torch.mm(compress(dy_to.t(), packed.backend), x_ti)
            return dw_oi.t().contiguous() if packed.transposed else dw_oi
    return x_ti.t() @ dy_to if packed.transposed else dy_to.t() @ x_ti
