"""Between factors and dense matrices: the product, and the factors nearest to a matrix (arXiv 2204.00595, section 3.2).

Block (k, m) of a Monarch matrix, seen as T[k, m] [s, p], has rank at most ρ = q / m = r / k, and any such block can be
had; so the nearest one takes the ρ largest singular triples of every block on its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain.ops.monarch_linear.reference import reference_monarch


def dense_of(right: Tensor, left: Tensor | None) -> Tensor:
    """The dense weight [o, i] of R [k, q, p] and L [m, s, r], or of R alone; differentiable."""
    k, _, p = right.shape
    return reference_monarch(torch.eye(k * p, dtype=right.dtype, device=right.device), right, left, None).t()


def project(weight_oi: Tensor, blocks_in: int, blocks_out: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The factors nearest to a weight in the Frobenius norm.

    Args:
        weight_oi: [o, i], divisible by the blocks. The SVD runs in fp32, or in fp64 for an fp64 weight.
        blocks_in, blocks_out: k and m.
        rank: ρ of every pair of blocks, at most min(o / m, i / k); there the factors are exact.

    Returns:
        R [k, ρ m, i / k] and L [m, o / m, k ρ] in the weight's dtype, and ‖W − M‖² / ‖W‖² (0 of a weight of zeros).

    Raises:
        ValueError: sizes that do not divide, a rank out of range, a weight that is not finite.
    """
    (o, i), k, m = weight_oi.shape, blocks_in, blocks_out
    if o % m or i % k:
        raise ValueError(
            f"project: a weight of {o} x {i} does not divide into {m} x {k} blocks. Pad it with zeros, or take other "
            "numbers of blocks."
        )
    if not 1 <= rank <= min(o // m, i // k):
        raise ValueError(
            f"project: rank={rank} of blocks of {o // m} x {i // k}. It must lie between 1 and {min(o // m, i // k)}."
        )
    blocks = _finite(weight_oi).view(o // m, m, k, i // k).permute(2, 1, 0, 3)  # (k, m, s, p)
    u, sigma, v = torch.linalg.svd(blocks, full_matrices=False)
    root = sigma[..., :rank].sqrt()
    left = (u[..., :rank] * root[..., None, :]).permute(1, 2, 0, 3).flatten(2)  # (m, s, k ρ)
    right = (v[..., :rank, :] * root[..., None]).transpose(1, 2).flatten(1, 2)  # (k, ρ m, p)
    lost = sigma[..., rank:].square().sum() / sigma.square().sum().clamp(min=torch.finfo(sigma.dtype).tiny)
    return right.to(weight_oi.dtype).contiguous(), left.to(weight_oi.dtype).contiguous(), lost


def project_diagonal(weight_oi: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """The diagonal blocks of a weight [o, i], the nearest block-diagonal matrix: R [k, o / k, i / k] and the lost share
    of ‖W‖².

    Raises:
        ValueError: as `project`.
    """
    (o, i), k = weight_oi.shape, blocks
    if o % k or i % k:
        raise ValueError(f"project: a weight of {o} x {i} does not divide into {k} diagonal blocks. Pad it with zeros.")
    values = _finite(weight_oi)
    diagonal = values.view(k, o // k, k, i // k).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    total = values.square().sum()
    lost = (total - diagonal.square().sum()) / total.clamp(min=torch.finfo(total.dtype).tiny)
    return diagonal.to(weight_oi.dtype).contiguous(), lost


def _finite(weight_oi: Tensor) -> Tensor:
    """The weight in fp32 at least."""
    values = weight_oi.detach().to(torch.promote_types(weight_oi.dtype, torch.float32))
    if not values.is_meta and not values.isfinite().all():
        broken = int((~values.isfinite()).sum())
        raise ValueError(f"project: {broken} of {values.numel()} weights are not finite. Load sound weights.")
    return values
