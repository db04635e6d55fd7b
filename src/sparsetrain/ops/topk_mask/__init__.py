"""Top-k masks: the smallest scores are masked, exactly as many as asked for, in one matrix or over several.

Formulas: movement pruning (arXiv 2005.07683, section 4) and PST (arXiv 2205.11005, section 3) mask so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, cat
from torch.autograd import Function

from sparsetrain.core.backend import choose
from sparsetrain.ops.topk_mask.reference import reference_mask
from sparsetrain.ops.topk_mask.torch import Cut as Cut
from sparsetrain.ops.topk_mask.torch import cut_mask as cut_mask
from sparsetrain.ops.topk_mask.torch import find_cut as find_cut

_NO_KERNEL = "no kernel is written for it yet"
_ROUNDING = 1e-6
"""1 - .7 is .30000000000000004 and 1 - .9 is .09999999999999998: of 10 entries three and one shall be masked."""


def topk_mask(scores: Tensor, num_zeros: int, *, backend: str = "auto") -> Tensor:
    """Mask the `num_zeros` smallest scores; of equal ones, those with the lowest index (row by row) are kept.

    Equals: sort the flat scores in descending order, stably, and mark all but the last `num_zeros`.

    Args:
        scores: any shape, floating point, of either sign.
        num_zeros: entries to mask, 0 to numel.
        backend: auto, torch (any device: a selection in place of the sort) or reference.

    Returns:
        bool mask of the scores' shape, with exactly `num_zeros` False.

    Raises:
        ValueError: more zeros than entries, fewer than none, or integer scores.
    """
    _check("topk_mask", scores, num_zeros)
    name = choose("topk_mask", backend, {"torch": None, "reference": None, "triton": _NO_KERNEL})
    scores = scores.detach()
    return reference_mask(scores, num_zeros) if name == "reference" else cut_mask(scores, find_cut(scores, num_zeros))


def straight_through_mask(scores: Tensor, num_zeros: int) -> Tensor:
    """`topk_mask` as 0 and 1 in the scores' dtype, whose backward hands the mask's gradient to the scores.

    Equals: `scores + (topk_mask(scores, num_zeros) - scores).detach()`, without the rounding.
    """
    _check("straight_through_mask", scores, num_zeros)
    return _StraightThrough.apply(scores, num_zeros)  # type: ignore[return-value]


def count_zeros(numel: int, keep_ratio: float) -> int:
    """⌊numel · (1 − keep_ratio)⌋: the entries to mask.

    Args:
        keep_ratio: share of the entries that is kept, in (0, 1].
    """
    return int(numel * (1 - keep_ratio) + _ROUNDING)


def global_zeros(scores: Sequence[Tensor], keep_ratio: float) -> list[int]:
    """How many of each matrix's scores are among the smallest of all: so many masked in each is one mask over all.

    Of equal scores those of earlier matrices are kept.

    Args:
        scores: matrices of any shapes.
        keep_ratio: share of all entries together that is kept, in (0, 1].

    Returns:
        a count for each, together exactly ⌊numel · (1 − keep_ratio)⌋.

    Cost: a copy of all scores while it runs.
    """
    joined = cat([score.detach().flatten() for score in scores])
    kept = topk_mask(joined, count_zeros(joined.numel(), keep_ratio))
    return [len(part) - int(part.sum()) for part in kept.split([score.numel() for score in scores])]


def _check(op: str, scores: Tensor, num_zeros: int) -> None:
    if not scores.is_floating_point():
        raise ValueError(f"{op}: scores are {scores.dtype}. Give floating-point scores.")
    if not 0 <= num_zeros <= scores.numel():
        raise ValueError(
            f"{op}: num_zeros={num_zeros}, and {tuple(scores.shape)} has {scores.numel()} entries. Mask 0 to all."
        )


class _StraightThrough(Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, num_zeros: int) -> Tensor:
        return topk_mask(scores, num_zeros).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
