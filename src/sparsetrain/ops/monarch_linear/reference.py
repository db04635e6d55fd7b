"""The definition in differentiable PyTorch, copies and all."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_monarch(x_ni: Tensor, right: Tensor, left: Tensor | None, bias: Tensor | None) -> Tensor:
    """y [n, o] of x [n, i], R [k, q, p], L [m, s, r] or None, bias [o] or None."""
    k, _, p = right.shape
    u_nkq = torch.einsum("nkp,kqp->nkq", x_ni.reshape(-1, k, p), right)
    if left is None:
        y_no = u_nkq.flatten(1)
    else:
        v_nmr = u_nkq.reshape(-1, left.shape[2], left.shape[0]).transpose(1, 2)
        y_no = torch.einsum("nmr,msr->nsm", v_nmr, left).flatten(1)
    return y_no if bias is None else y_no + bias
