"""Flood fill and diagonal convolution against loops over single cells, and the published small cases."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsetrain.ops.flood_fill import diagonal_convolution, diagonal_sums, flood_fill, pool_blocks, reference
from sparsetrain.ops.flood_fill.cases import TINY


def grid(rows: str) -> Tensor:
    return torch.tensor([[float(x) for x in row.split()] for row in rows.split("\n")])


PUBLISHED = grid("9 1 8 0\n1 7 1 0\n6 2 5 1\n0 6 4 3")


def test_the_published_case() -> None:
    wanted = grid("0 0 1 0\n0 1 0 0\n0 0 1 0\n0 1 1 1").bool()
    assert torch.equal(flood_fill(PUBLISHED, 2.5), wanted)
    assert torch.equal(reference.flood_fill(PUBLISHED, 2.5), wanted)
    assert torch.quantile(PUBLISHED.flatten(), 0.5) == 2.5


@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_loop_on_a_thousand_grids(causal: bool) -> None:
    """Sizes 1 to 20, half of the grids with many ties; the grids of a case at a time, thresholds of their own."""
    seen = 0
    for case in TINY:
        grids = case.tensor(causal, seed=100 * causal)
        limits = grids.flatten(1).quantile(0.5, dim=1)
        found = flood_fill(grids, limits, causal=causal)
        for one, limit, marks in zip(grids, limits, found, strict=True):
            assert torch.equal(marks, reference.flood_fill(one, float(limit), causal=causal))
            seen += 1
    assert seen == 1000


def test_zero_and_constant_grids() -> None:
    assert not flood_fill(torch.zeros(6, 6), 0).any()
    wanted = torch.ones(6, 6, dtype=torch.bool)
    wanted[0], wanted[:, 0] = False, False
    assert torch.equal(flood_fill(torch.ones(6, 6), 0.5), wanted)


def test_marks_lie_above_the_threshold_and_shrink_with_it() -> None:
    grids = torch.rand(20, 12, 12, generator=torch.Generator().manual_seed(3))
    before = flood_fill(grids, -1.0)
    for limit in (0.2, 0.5, 0.9):
        marks = flood_fill(grids, limit)
        assert not (marks & ~before).any() and not (marks & (grids <= limit)).any()
        before = marks


def test_causal_walks_never_cross_the_diagonal() -> None:
    grids = torch.rand(200, 9, 9, generator=torch.Generator().manual_seed(4)).tril()
    assert not flood_fill(grids, -1.0, causal=True).triu(1).any()


@pytest.mark.parametrize("edge", [1, 3, 5, 7, 31])
def test_convolution_equals_the_loop_and_conv2d(edge: int) -> None:
    map_tt = torch.rand(13, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(edge))
    found = diagonal_convolution(map_tt, edge)
    torch.testing.assert_close(found, reference.diagonal_convolution(map_tt, edge), rtol=0, atol=1e-13)
    kernel = torch.eye(edge, dtype=torch.float64)[None, None]
    wanted = torch.nn.functional.conv2d(map_tt[None, None], kernel, padding=edge // 2)[0, 0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)


def test_convolution_of_ones() -> None:
    found = diagonal_convolution(torch.ones(64, 64), 31)
    assert found[32, 32] == 31 and found[0, 0] == 16 and found[0, 63] == 1


@pytest.mark.parametrize("length", range(1, 12))
def test_diagonal_sums_of_any_length(length: int) -> None:
    x = torch.rand(2, 15, 17, dtype=torch.float64)
    wanted = torch.zeros(2, 16 - length, 18 - length, dtype=torch.float64)
    for u in range(length):
        wanted += x[:, u : u + 16 - length, u : u + 18 - length]
    torch.testing.assert_close(diagonal_sums(x, length), wanted)


def test_pooling() -> None:
    x = torch.arange(36.0).view(6, 6)
    assert torch.equal(pool_blocks(x, 3)[0, 1], x[:3, 3:].mean())
    with pytest.raises(ValueError, match="6 x 6 tokens cannot be cut into blocks of 4"):
        pool_blocks(x, 4)


def test_an_even_filter_has_no_middle() -> None:
    for edge in (0, 4, -3):
        with pytest.raises(ValueError, match="odd number"):
            diagonal_convolution(torch.ones(4, 4), edge)
