from __future__ import annotations

import pytest
import torch

from sparsetrain.ops.magnitude_threshold import magnitude_threshold
from sparsetrain.ops.magnitude_threshold.cases import REAL, TINY, Case
from sparsetrain.ops.magnitude_threshold.reference import reference_threshold


@pytest.mark.parametrize("case", [*TINY, *REAL], ids=lambda case: case.name)
def test_it_is_the_sorted_entry(case: Case) -> None:
    tensors = case.tensors()
    total = sum(t.numel() for t in tensors)
    for rank in sorted({0, total // 10, total // 2, total - 1}):
        found = magnitude_threshold(tensors, rank)
        assert found == reference_threshold(tensors, rank)
        assert sum(int((t.float().abs() < found).sum()) for t in tensors) <= rank


def test_without_equal_entries_exactly_rank_are_below() -> None:
    tensors = [torch.randn(50, 20, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    assert sum(int((t.abs() < magnitude_threshold(tensors, 300)).sum()) for t in tensors) == 300


def test_more_entries_than_quantile_takes() -> None:
    """Takes a second: 2^24 entries and one more, which torch.quantile refuses."""
    many = torch.arange(2**24 + 1, dtype=torch.float32).div_(2**24).flip(0)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(many, 0.1)
    assert magnitude_threshold([many], 2**20) == 2**20 / 2**24


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank=6 of 6 entries\. Give a rank"):
        magnitude_threshold([torch.ones(2, 3)], 6)
    with pytest.raises(ValueError, match=r"is torch\.int8\. Magnitudes need floating-point"):
        magnitude_threshold([torch.ones(2, dtype=torch.int8)], 0)
    with pytest.raises(ValueError, match="on the meta device"):
        magnitude_threshold([torch.ones(2, device="meta")], 0)
