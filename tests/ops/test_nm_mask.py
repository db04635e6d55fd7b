"""N:M and transposable masks against sorting and against brute force over the 90 patterns."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sparsetrain.core.errors import Unsupported
from sparsetrain.ops.nm_mask import flip_rate, masked_weight, nm_mask, tile_patterns, transposable_mask
from sparsetrain.ops.nm_mask.cases import TINY, Case

SEARCHES = ("exact", "greedy")


def weights(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rows_and_columns(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Ones in each row and in each column of every 4x4 tile."""
    tiles = mask.unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).transpose(1, 2)
    return tiles.sum(-1), tiles.sum(-2)


def test_there_are_90_patterns_in_order_and_each_entry_is_in_45() -> None:
    patterns = tile_patterns()
    every = [
        bits
        for bits in itertools.product((0, 1), repeat=16)
        if all(sum(bits[r * 4 : r * 4 + 4]) == 2 and sum(bits[r::4]) == 2 for r in range(4))
    ]
    assert patterns.int().tolist() == [list(bits) for bits in sorted(every)]
    assert len(patterns) == 90 and (patterns.sum(0) == 45).all()


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_nm_masks_equal_a_stable_sort(case: Case) -> None:
    w = case.tensor()
    mask = nm_mask(w, case.keep, case.group, case.dim)
    assert torch.equal(mask, nm_mask(w, case.keep, case.group, case.dim, backend="reference"))
    assert (mask.movedim(case.dim, -1).unflatten(-1, (-1, case.group)).sum(-1) == case.keep).all()


def test_nm_masks_of_a_convolution_run_along_its_input_channels() -> None:
    w = weights(6, 8, 3, 3)
    mask = nm_mask(w, dim=1)
    assert (mask.unflatten(1, (2, 4)).sum(2) == 2).all()
    assert torch.equal(mask, nm_mask(w, dim=1, backend="reference"))


def test_ties_go_to_the_lower_index() -> None:
    assert nm_mask(torch.ones(8)).tolist() == [True, True, False, False] * 2
    assert nm_mask(torch.tensor([1.0, 3.0, -3.0, 3.0])).tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_exact_masks_keep_what_brute_force_keeps(dtype: torch.dtype) -> None:
    w = weights(24, 40, dtype=dtype)
    mask = transposable_mask(w)
    # two patterns of a bf16 tile can keep equal sums; those are decided by the rule, and fp32 sums of 8 are exact there
    assert torch.equal(mask, transposable_mask(w, backend="reference"))
    for counts in rows_and_columns(mask):
        assert (counts == 2).all()


def test_transposing_the_weights_transposes_the_mask() -> None:
    w = weights(24, 40)
    assert torch.equal(transposable_mask(w.t()), transposable_mask(w).t())
    assert torch.equal(transposable_mask(w.t().contiguous().t()), transposable_mask(w))
    tied = w.round()
    one, other = transposable_mask(tied.t()), transposable_mask(tied)
    torch.testing.assert_close((tied.t().abs() * one).sum(), (tied.abs() * other).sum())


@pytest.mark.parametrize("search", SEARCHES)
def test_scale_and_signs_do_not_matter(search: str) -> None:
    w = weights(16, 16)
    signs = weights(16, 16, seed=1).sign()
    assert torch.equal(transposable_mask(w * 4 * signs, search=search), transposable_mask(w, search=search))


def test_a_tile_in_which_every_pattern_keeps_the_same_is_decided_by_order() -> None:
    tile = torch.arange(1.0, 17).view(4, 4)
    kept = (tile.flatten() * tile_patterns()).sum(1)
    assert (kept == 68).all()
    first = tile_patterns()[0].view(4, 4)
    assert torch.equal(transposable_mask(tile), first)
    assert torch.equal(transposable_mask(tile, backend="reference"), first)


def test_greedy_takes_the_largest_first() -> None:
    w = weights(24, 40)
    mask = transposable_mask(w, search="greedy")
    assert torch.equal(mask, transposable_mask(w, search="greedy", backend="reference"))
    for counts in rows_and_columns(mask):
        assert (counts <= 2).all() and (counts < 2).any()
    one = torch.tensor([[5.0, 14, 13, 11], [10, 7, 15, 6], [1, 12, 2, 3], [8, 16, 4, 9]])
    assert (one * transposable_mask(one, search="greedy")).sum() == 81
    assert transposable_mask(one).int().tolist() == [[0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]]
    assert (one * transposable_mask(one)).sum() == 88
    two = torch.tensor([[5.0, 7, 14, 11], [13, 2, 12, 8], [10, 1, 9, 15], [4, 16, 6, 3]])
    greedy = transposable_mask(two, search="greedy")
    assert greedy.sum() == 7 and (two * greedy).sum() == 91 and (two * transposable_mask(two)).sum() == 90


def test_kept_shares_on_gaussian_weights() -> None:
    w = weights(512, 512)
    kept = {search: float((w.abs() * transposable_mask(w, search=search)).sum() / w.abs().sum()) for search in SEARCHES}
    kept["row"] = float((w.abs() * nm_mask(w)).sum() / w.abs().sum())
    assert kept == pytest.approx({"exact": 0.704, "greedy": 0.694, "row": 0.746}, abs=3e-3)
    assert float((w.square() * transposable_mask(w)).sum() / w.square().sum()) == pytest.approx(0.818, abs=3e-3)


def test_flip_rate_counts_changed_entries() -> None:
    mask = nm_mask(weights(8, 8))
    assert flip_rate(mask, mask) == 0 and flip_rate(~mask, mask) == 1
    other = mask.clone()
    other[0, 0] ^= True
    assert flip_rate(other, mask) == pytest.approx(1 / 64)
    before, after = weights(8, 8), weights(8, 8, seed=1)
    rates = {float(flip_rate(nm_mask(c * after), nm_mask(before))) for c in (0.5, 1.0, 8.0)}
    assert len(rates) == 1 and rates.pop() > 0


@pytest.mark.parametrize("decay", [0.0, 2e-4])
def test_straight_through_and_sr_ste_gradients_equal_their_formulas(decay: float) -> None:
    w = weights(8, 16, dtype=torch.float64).requires_grad_()
    mask, grad = nm_mask(w), weights(8, 16, seed=1, dtype=torch.float64)
    pruned = masked_weight(w, mask, decay)
    assert torch.equal(pruned, w * mask)
    pruned.backward(grad)
    assert w.grad is not None
    torch.testing.assert_close(w.grad, grad + decay * (1 - mask.double()) * w.detach(), rtol=0, atol=1e-15)
    if decay == 0:
        assert torch.equal(w.grad, grad)


def test_bad_input_says_what_to_do() -> None:
    w = weights(8, 8)
    for keep, group in ((0, 4), (5, 4), (1, 1)):
        with pytest.raises(ValueError, match=f"{keep}:{group} is no pattern"):
            nm_mask(w, keep, group)
    with pytest.raises(ValueError, match="do not divide into groups of 4"):
        nm_mask(weights(8, 6))
    with pytest.raises(ValueError, match="need floating-point"):
        nm_mask(torch.ones(8, dtype=torch.int8))
    with pytest.raises(ValueError, match="4x4 tiles"):
        transposable_mask(weights(8, 6))
    with pytest.raises(ValueError, match="search='best' is unknown"):
        transposable_mask(w, search="best")
    with pytest.raises(ValueError, match="decay=-1 is negative"):
        masked_weight(w, nm_mask(w), -1)
    with pytest.raises(Unsupported, match=r"searches exactly|triton is not installed"):
        transposable_mask(w, search="greedy", backend="triton")
