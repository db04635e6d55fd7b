"""N:M masks: which N of M consecutive weights are kept, along one dimension or along both (2:4 transposable)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, device, float32, promote_types
from torch.autograd import Function

from sparsetrain.core.backend import choose, no_triton
from sparsetrain.core.config import one_of
from sparsetrain.ops.nm_mask.patterns import TILE as TILE
from sparsetrain.ops.nm_mask.patterns import tile_patterns as tile_patterns
from sparsetrain.ops.nm_mask.reference import reference_greedy, reference_nm, reference_transposable
from sparsetrain.ops.nm_mask.torch import greedy_transposable, matmul_transposable, ranked_nm

_TRANSPOSABLE = {
    ("exact", "torch"): matmul_transposable,
    ("exact", "reference"): reference_transposable,
    ("greedy", "torch"): greedy_transposable,
    ("greedy", "reference"): reference_greedy,
}


def nm_mask(
    w: Tensor, keep: int = 2, group: int = 4, dim: int = -1, *, by: str = "magnitude", backend: str = "auto"
) -> Tensor:
    """Keep the `keep` largest magnitudes of every `group` consecutive entries along `dim`; ties go to the lower index.

    Equals: sort |w| of each group in descending order, stably, and mark the first `keep`.

    Args:
        w: any shape; `dim` must divide into groups. Convolutions: groups along the input channels are dim=1.
        by: `magnitude`; or `value`, for scores, of which the largest are kept and a negative one is a low one.
        backend: auto, torch (any device), triton (a GPU's) or reference.

    Returns:
        bool mask of w's shape, exactly `keep` ones a group.

    Raises:
        ValueError: keep outside 1..group, group < 2, integer weights, a size that does not divide, or an unknown `by`.
    """
    one_of("nm_mask", "by", by, ("magnitude", "value"))
    if group < 2 or not 1 <= keep <= group:
        raise ValueError(f"nm_mask: {keep}:{group} is no pattern. Choose 1 <= keep <= group and group >= 2.")
    if not w.is_floating_point():
        raise ValueError(f"nm_mask: weights are {w.dtype}. Magnitudes need floating-point weights; dequantise first.")
    if w.shape[dim] % group:
        raise ValueError(
            f"nm_mask: dimension {dim} of {tuple(w.shape)} has {w.shape[dim]} entries, which do not divide into groups "
            f"of {group}. Leave this weight dense, or choose another dimension."
        )
    name = choose("nm_mask", backend, on_device(w.device))
    if name == "triton":
        from sparsetrain.ops.nm_mask.triton import ranked

        return ranked(w.detach(), keep, group, dim % w.ndim, by == "magnitude")
    ranks = w.detach().abs() if by == "magnitude" else w.detach()
    return (ranked_nm if name == "torch" else reference_nm)(ranks, keep, group, dim)


def transposable_mask(w_oi: Tensor, *, search: str = "exact", backend: str = "auto") -> Tensor:
    """A 2:4 mask whose transpose is 2:4 too, so that one weight serves the forward and the input gradient.

    Each 4x4 tile takes, of the 90 patterns with two ones in every row and column, the one of largest kept Σ|w| (FST,
    arXiv 2404.01847, section 4.1). On Gaussian weights it keeps .704 of the L1 norm (`nm_mask` along rows: .746).

    Args:
        w_oi: weights [out, in], both divisible by 4.
        search: `exact`; or `greedy`, which takes a tile's entries from the largest down, at most two in a row and
            column: it keeps .694 and ends with 7 ones in 16 % of tiles.
        backend: auto, torch (any device), triton (a GPU's, `exact` alone) or reference.

    Returns:
        bool mask [out, in].

    Raises:
        ValueError: a size that does not divide by 4, or an unknown search.
    """
    one_of("transposable_mask", "search", search, ("exact", "greedy"))
    if w_oi.ndim != 2 or w_oi.shape[0] % TILE or w_oi.shape[1] % TILE:
        raise ValueError(
            f"transposable_mask: weights {tuple(w_oi.shape)} do not divide into {TILE}x{TILE} tiles. "
            "Both sizes must be multiples of 4; leave this weight dense, or use a mask along rows."
        )
    greedy = None if search == "exact" else "the kernel searches exactly"
    name = choose("transposable_mask", backend, on_device(w_oi.device, greedy))
    if name == "triton":
        from sparsetrain.ops.nm_mask.triton import transposable

        return transposable(w_oi.detach())
    return _TRANSPOSABLE[search, name](w_oi.detach())


def on_device(place: device, unable: str | None = None) -> dict[str, str | None]:
    """Backends there, best first, and why the kernel cannot run: because of the place, or else `unable`."""
    kernel = no_triton(place) or unable
    if place.type == "cuda":
        return {"triton": kernel, "torch": None, "reference": None}
    return {"torch": None, "reference": None, "triton": kernel}


def flip_rate(new: Tensor, old: Tensor) -> Tensor:
    """‖M_new − M_old‖₁ / D: the share of mask entries that changed, a scalar in [0, 1]."""
    return (new != old).float().mean()


def masked_weight(weight: Tensor, mask: Tensor, decay: float = 0.0, scale: Tensor | None = None) -> Tensor:
    """W ∘ M with a straight-through backward: dW = G + decay · (1 − M) ∘ W, where G is the gradient at W ∘ M.

    decay = 0 is the plain straight-through estimator, else SR-STE (arXiv 2102.04010; SparseDM, arXiv 2404.10445).

    Args:
        weight: any shape.
        mask: of the same shape.
        decay: λ ≥ 0; it pulls pruned weights towards zero, so that masks settle.
        scale: a scalar on λ, read in the backward: the part of a step that this one is, and a gradient scaler's.

    Raises:
        ValueError: λ < 0.
    """
    if decay < 0:
        raise ValueError(f"masked_weight: decay={decay} is negative. It must be at least 0.")
    return _Masked.apply(weight, mask, decay, scale)  # type: ignore[return-value]


class _Masked(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float, scale: Tensor | None) -> Tensor:
        ctx.decay, ctx.scale = decay, scale
        if decay:
            ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        if ctx.decay:
            weight, mask = ctx.saved_tensors
            wide = promote_types(weight.dtype, float32)
            decay = ctx.decay if ctx.scale is None else (ctx.decay * ctx.scale.to(wide)).to(weight.dtype)
            grad = grad + decay * weight.masked_fill(mask, 0)
        return grad, None, None, None
