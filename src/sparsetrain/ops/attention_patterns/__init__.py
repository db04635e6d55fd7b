"""Fixed block patterns of attention: cut from a pooled attention map, fitted to a length, turned into block lists.

Legend: h heads that have a pattern of their own (1 if all share one), n blocks a side, k list slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain.ops.attention_patterns.maps import MapSums as MapSums
from sparsetrain.ops.attention_patterns.maps import pooled_maps as pooled_maps
from sparsetrain.ops.flood_fill import walked_cells

VARIANTS = ("cf", "c", "f", "top_q", "window")


def block_pattern(
    grid_hnn: Tensor,
    seen_nn: Tensor,
    *,
    variant: str,
    quantile: float | None = None,
    keep_ratio: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Which blocks of keys each block of queries keeps (SPION, arXiv 2309.12578; `top_q` and `window` are controls).

    With `quantile` q, t = quantile(grid[seen], q):
        cf, f    cells above t that a walk of the flood fill enters (cf reads the convolved grid)
        top_q    cells above t
        c        as with keep_ratio = 1 - q
        window   as with keep_ratio = 1 - q
    With `keep_ratio`, of N seen cells:
        cf, f, top_q, window   the int(keep_ratio N) - n largest off the diagonal, of those that the rule allows
        c                      the int(keep_ratio N) - n largest, the diagonal among them (published)
    and the diagonal is added. `window` orders cells by their distance from the diagonal. 1 keeps every seen cell.

    Args:
        grid_hnn: pooled maps, at least 0, finite.
        seen_nn: bool, cells with a visible pair; the others are never kept and leave the quantile.
        quantile: in [0, 1).
        keep_ratio: in (0, 1]; kept / seen is at most this (but the diagonal is always kept).
        causal: the grid is lower triangular.

    Returns:
        bool [h, n, n], the diagonal true.

    Raises:
        ValueError: unknown variant; neither or both of the targets; a grid with NaN or infinity.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r} is unknown. Choose from {VARIANTS}.")
    if (quantile is None) == (keep_ratio is None):
        raise ValueError(f"quantile={quantile}, keep_ratio={keep_ratio}: give exactly one of them.")
    if not bool(grid_hnn.isfinite().all()):
        raise ValueError("the attention map holds NaN or infinity, so no pattern can be cut. The model has diverged.")
    n = grid_hnn.shape[-1]
    seen_nn = seen_nn.tril() if causal else seen_nn
    diagonal = torch.eye(n, dtype=torch.bool, device=grid_hnn.device)
    if keep_ratio == 1:
        return (seen_nn | diagonal).expand_as(grid_hnn).clone()
    grid_hnn = grid_hnn.float() * seen_nn
    if variant == "window":
        row = torch.arange(n, device=grid_hnn.device)
        grid_hnn = (-(row[:, None] - row).abs()).float().expand_as(grid_hnn)
    allowed = walked_cells(grid_hnn, causal=causal) if variant in ("cf", "f") else torch.ones_like(grid_hnn).bool()
    allowed = allowed & seen_nn
    if quantile is not None and variant not in ("c", "window"):
        limit = torch.quantile(grid_hnn[:, seen_nn], quantile, dim=-1)
        return allowed & (grid_hnn > limit[:, None, None]) | diagonal
    if keep_ratio is None:
        assert quantile is not None
        keep_ratio = 1 - quantile
    count = max(0, int(keep_ratio * int(seen_nn.sum()) + 1e-6) - n)
    return _largest(grid_hnn, allowed if variant == "c" else allowed & ~diagonal, count) | diagonal


def _largest(grid_hnn: Tensor, allowed_hnn: Tensor, count: int) -> Tensor:
    """The `count` largest allowed cells of each grid; of equal ones, those of lowest flat index."""
    values = grid_hnn.masked_fill(~allowed_hnn, -torch.inf).flatten(1)
    order = values.argsort(dim=1, descending=True, stable=True)[:, :count]
    chosen = torch.zeros_like(values, dtype=torch.bool).scatter_(1, order, True)
    return chosen.view_as(grid_hnn) & allowed_hnn


def fit_pattern(mask_hnn: Tensor, num_blocks: int, extend: str = "error") -> Tensor:
    """The pattern for a sequence of `num_blocks` blocks: its upper left corner, or its last row carried on.

    Args:
        mask_hnn: bool.
        extend: for longer sequences; `error`, or `diagonal`: row i keeps what the last row keeps, at equal distance.

    Raises:
        ValueError: the sequence is longer than the pattern, and that is an error.
    """
    n = mask_hnn.shape[-1]
    if num_blocks <= n:
        return mask_hnn[:, :num_blocks, :num_blocks]
    if extend != "diagonal":
        raise ValueError(
            f"a sequence of {num_blocks} blocks is longer than the pattern, {n} blocks, which was cut from the probe "
            "rows. Give probe rows (calibration) of full length, or set extend='diagonal'."
        )
    longer = mask_hnn.new_zeros(len(mask_hnn), num_blocks, num_blocks)
    longer[:, :n, :n] = mask_hnn
    for row in range(n, num_blocks):
        longer[:, row, row - n + 1 : row + 1] = mask_hnn[:, -1]
    return longer


def block_lists(mask_hnn: Tensor) -> Tensor:
    """The true cells of each row, for `block_sparse_attention`: bool [h, n, n] -> ids [1, h, n, k], -1 = empty slot."""
    kept = mask_hnn.sum(-1)
    slots = max(1, int(kept.max()))
    order = mask_hnn.byte().argsort(dim=-1, descending=True, stable=True)[..., :slots]
    filled = torch.arange(slots, device=mask_hnn.device) < kept[..., None]
    return torch.where(filled, order, -1)[None]
