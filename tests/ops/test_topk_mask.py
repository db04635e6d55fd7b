"""Top-k masks against a stable sort, with exact counts."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from sparsetrain.core.errors import Unsupported
from sparsetrain.ops.topk_mask import count_zeros, global_zeros, straight_through_mask, topk_mask
from sparsetrain.ops.topk_mask.cases import TINY, Case


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_masks_equal_a_stable_sort_and_have_exact_counts(case: Case, dtype: torch.dtype) -> None:
    scores = case.tensor(dtype)
    zeros = count_zeros(scores.numel(), case.keep_ratio)
    mask = topk_mask(scores, zeros)
    assert torch.equal(mask, topk_mask(scores, zeros, backend="reference"))
    assert mask.shape == scores.shape and int(mask.sum()) == scores.numel() - zeros
    if 0 < zeros < scores.numel():
        assert scores[mask].min() >= scores[~mask].max()


@pytest.mark.parametrize("percent", [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95])
def test_counts_are_exact_with_all_equal_scores(percent: int) -> None:
    for numel in (10, 200, 1000, 12345):
        zeros = count_zeros(numel, 1 - percent / 100)
        assert zeros == int(Fraction(percent, 100) * numel)
        mask = topk_mask(torch.zeros(numel), zeros)
        assert mask.tolist() == [True] * (numel - zeros) + [False] * zeros, "the lower index is kept"


@pytest.mark.parametrize("scale", ["none", "columns", "sorted", "few values"])
@pytest.mark.parametrize("percent", [0.001, 10, 50, 90, 99.999])
def test_large_matrices_are_selected_from_exactly(scale: str, percent: float) -> None:
    scores = torch.randn(300, 576, generator=torch.Generator().manual_seed(0))
    if scale == "columns":
        scores = scores + torch.arange(576) % 216
    elif scale == "sorted":  # the sample misses nothing, or is told so
        scores = scores.flatten().sort().values.view(300, 576)
    elif scale == "few values":
        scores = scores.round()
    zeros = count_zeros(scores.numel(), 1 - percent / 100)
    assert torch.equal(topk_mask(scores, zeros), topk_mask(scores, zeros, backend="reference"))


def test_the_layout_in_memory_does_not_change_the_mask() -> None:
    scores = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).round()
    stored = scores.t().contiguous().t()
    assert not stored.is_contiguous()
    assert torch.equal(topk_mask(stored, 20), topk_mask(scores, 20))


def test_all_or_nothing() -> None:
    scores = torch.randn(4, 4)
    assert topk_mask(scores, 0).all() and not topk_mask(scores, 16).any()


def test_a_mask_over_several_matrices_is_one_over_all() -> None:
    parts = [case.tensor(seed=i) * 2**i for i, case in enumerate(TINY)]
    joined = torch.cat([part.flatten() for part in parts])
    zeros = global_zeros(parts, 0.3)
    assert sum(zeros) == count_zeros(len(joined), 0.3)
    assert len(set(zeros)) > 1, "scores of different scales are masked unevenly"
    together = topk_mask(joined, sum(zeros)).split([part.numel() for part in parts])
    for part, own, count in zip(parts, together, zeros, strict=True):
        assert torch.equal(topk_mask(part, count), own.view(part.shape))


def test_straight_through_hands_the_gradient_to_the_scores() -> None:
    scores = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    mask = straight_through_mask(scores, 12)
    assert mask.dtype == torch.float64 and torch.equal(mask.bool(), topk_mask(scores, 12))
    gradient = torch.randn(5, 7, dtype=torch.float64)
    mask.backward(gradient)
    assert torch.equal(scores.grad, gradient)  # type: ignore[arg-type]


def test_bad_input_is_an_error() -> None:
    with pytest.raises(ValueError, match="has 4 entries"):
        topk_mask(torch.ones(2, 2), 5)
    with pytest.raises(ValueError, match="num_zeros=-1"):
        topk_mask(torch.ones(2, 2), -1)
    with pytest.raises(ValueError, match=r"torch\.int64"):
        topk_mask(torch.ones(2, dtype=torch.int64), 1)
    with pytest.raises(Unsupported, match="no kernel"):
        topk_mask(torch.ones(2, 2), 1, backend="triton")
