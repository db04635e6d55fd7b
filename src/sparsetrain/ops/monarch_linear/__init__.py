"""y = M x + b, M = L P R: two block-diagonal factors and a permutation between them (arXiv 2204.00595, section 3).

With k input blocks of width p, q outputs each, and m output blocks of width s, r inputs each (k q = m r):

    u[k, q] = R[k, q, :] · x[k, :]          the k input blocks, each times its own matrix
    v[m, r] = u as [r, m blocks], transposed          the permutation
    y[s, m blocks] = L[m, s, :] · v[m, :]          the m output blocks, interleaved

Legend: n rows, k p q of the first factor, m s r of the second, i = k p inputs, o = s m outputs.
"""

from __future__ import annotations

from torch import Tensor, autocast, get_autocast_dtype, is_autocast_enabled

from sparsetrain.core.backend import choose
from sparsetrain.ops.monarch_linear.choice import best_first, run
from sparsetrain.ops.monarch_linear.projection import dense_of as dense_of
from sparsetrain.ops.monarch_linear.projection import project as project
from sparsetrain.ops.monarch_linear.projection import project_diagonal as project_diagonal


def monarch_linear(
    x: Tensor,
    right: Tensor,
    left: Tensor | None,
    bias: Tensor | None = None,
    *,
    columns: bool = False,
    backend: str = "auto",
) -> Tensor:
    """y = L P R x + b, in two batched products.

    Equals: F.linear(x, dense_of(right, left), bias).

    The faster path computes feature by feature ([o, n] in memory), where both permutations are strides of a product's
    operands and nothing is copied; the one copy left makes the result row by row again.

    Args:
        x: [..., i]. right: R [k, q, p]. left: L [m, s, r], or None for R alone: plain diagonal blocks, y[k q].
        bias: [o] or None.
        columns: leave the result as it was computed, strides (1, n): right where element-wise functions and another
            linear of this kind follow. Its gradient is laid out as x is.
        backend: auto, torch (any device), triton (a GPU's: reads and writes any strides, so nothing is copied) or
            reference. On a GPU `auto` takes the faster of the first two, timed once a shape.

    Returns:
        y [..., o], in x's dtype, or autocast's.

    Raises:
        ValueError: sizes that do not fit.

    Cost: 2 (k q p + m s r) FLOPs a row; saves x and u, so i + k q elements.
    """
    _check(x, right, left, bias)
    device = x.device.type
    dtype = get_autocast_dtype(device) if is_autocast_enabled(device) else x.dtype
    name = choose("monarch_linear", backend, best_first(x, right, left, dtype))
    given = [None if t is None else t.to(dtype) for t in (right, left, bias)]
    with autocast(device, enabled=False):
        x_ni = x.reshape(-1, x.shape[-1]).to(dtype)
        y_no = run(name, x_ni, *given, columns)  # type: ignore[arg-type]
    return y_no.view(*x.shape[:-1], y_no.shape[1])


def _check(x: Tensor, right: Tensor, left: Tensor | None, bias: Tensor | None) -> None:
    k, q, p = right.shape
    if x.shape[-1] != k * p:
        raise ValueError(
            f"monarch_linear: x has {x.shape[-1]} channels and R {tuple(right.shape)} takes {k} blocks of {p}. Pad x."
        )
    if left is not None and left.shape[0] * left.shape[2] != k * q:
        raise ValueError(
            f"monarch_linear: R {tuple(right.shape)} gives {k * q} numbers and L {tuple(left.shape)} takes "
            f"{left.shape[0] * left.shape[2]}. Give factors with k·q = m·r."
        )
    outputs = k * q if left is None else left.shape[0] * left.shape[1]
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"monarch_linear: bias {tuple(bias.shape)} of {outputs} outputs. Give one number an output.")
