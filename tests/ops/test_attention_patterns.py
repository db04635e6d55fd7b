"""Patterns against their rules on single cells, pooled maps against whole ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparsetrain.ops.attention_patterns import VARIANTS, block_lists, block_pattern, fit_pattern, pooled_maps, reference
from sparsetrain.ops.attention_patterns.cases import TINY, Case
from sparsetrain.ops.flood_fill import diagonal_convolution, pool_blocks
from tests.ops.test_flood_fill import PUBLISHED, grid


def everywhere(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool)


def test_the_published_case() -> None:
    options = {"quantile": 0.5}
    flooded = block_pattern(PUBLISHED[None], everywhere(4), variant="f", **options)
    assert torch.equal(flooded[0], grid("1 0 1 0\n0 1 0 0\n0 0 1 0\n0 1 1 1").bool())
    above = block_pattern(PUBLISHED[None], everywhere(4), variant="top_q", **options)
    assert torch.equal(above[0], grid("1 0 1 0\n0 1 0 0\n1 0 1 0\n0 1 1 1").bool())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("variant", ["cf", "c", "f", "top_q"])
def test_equals_the_rule_cell_by_cell(variant: str, causal: bool) -> None:
    draw = torch.Generator().manual_seed(5)
    for n in (1, 2, 3, 6, 11):
        for ties in (False, True):
            grids = torch.rand(7, n, n, generator=draw)
            grids = (grids * 4).floor() if ties else grids
            grids = grids.tril() if causal else grids
            target = {"keep_ratio": 0.6} if variant == "c" else {"quantile": 0.7}
            found = block_pattern(grids, everywhere(n), variant=variant, causal=causal, **target)
            for one, mask in zip(grids, found, strict=True):
                assert torch.equal(mask, reference.block_pattern(one, variant, 0.7, 0.6, causal))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("causal", [False, True])
def test_density_reaches_its_target_and_never_passes_it(variant: str, causal: bool) -> None:
    grids = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(6))
    grids = grids.tril() if causal else grids
    seen = everywhere(32).tril() if causal else everywhere(32)
    for ratio in (0.08, 0.16, 0.5):
        mask = block_pattern(grids, seen, variant=variant, keep_ratio=ratio, causal=causal)
        assert mask.diagonal(dim1=1, dim2=2).all() and not (mask & ~seen).any()
        density = mask.sum((1, 2)) / seen.sum()
        assert (density <= ratio).all()
        if variant in (
            "top_q",
            "window",
        ):  # a walk reaches only some cells; `c` spends some of its picks on the diagonal
            assert (density > ratio - 1 / seen.sum()).all()
    assert torch.equal(block_pattern(grids, seen, variant=variant, keep_ratio=1, causal=causal), seen.expand(3, -1, -1))
    if variant not in ("c", "window"):
        before = seen
        for q in (0.0, 0.3, 0.9, 0.99):
            mask = block_pattern(grids, seen, variant=variant, quantile=q, causal=causal)
            assert not (mask & ~before).any()
            before = mask


def test_a_window_keeps_the_nearest_blocks() -> None:
    mask = block_pattern(torch.rand(1, 8, 8), everywhere(8), variant="window", keep_ratio=22 / 64)
    row = torch.arange(8)
    assert torch.equal(mask[0], (row[:, None] - row).abs() <= 1)


@pytest.mark.parametrize("variant", ["cf", "f", "top_q"])
def test_identity_zero_and_unseen_cells(variant: str) -> None:
    for n in (1, 6):
        for map_nn in (torch.eye(n), torch.zeros(n, n)):
            mask = block_pattern(map_nn[None], everywhere(n), variant=variant, quantile=0.9)
            assert torch.equal(mask[0], torch.eye(n, dtype=torch.bool))
    seen = everywhere(6)
    seen[:, 4:] = False
    mask = block_pattern(torch.rand(1, 6, 6) + 1, seen, variant=variant, quantile=0.0)
    assert not mask[0, :4, 4:].any()


def test_errors() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        block_pattern(PUBLISHED[None], everywhere(4), variant="f")
    with pytest.raises(ValueError, match="unknown"):
        block_pattern(PUBLISHED[None], everywhere(4), variant="g", quantile=0.5)
    with pytest.raises(ValueError, match="NaN"):
        block_pattern(PUBLISHED[None] * torch.nan, everywhere(4), variant="f", quantile=0.5)


def test_lists_name_the_true_cells() -> None:
    mask = torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(7)) > 0.7
    lists = block_lists(mask)
    assert lists.shape == (1, 3, 9, int(mask.sum(-1).max()))
    again = torch.zeros(3, 9, 10, dtype=torch.bool).scatter_(2, torch.where(lists[0] < 0, 9, lists[0]), True)
    assert torch.equal(again[..., :9], mask)


def test_shorter_takes_the_corner_and_longer_repeats_the_last_row() -> None:
    mask = grid("1 0 0\n1 1 0\n0 1 1").bool()[None]
    assert torch.equal(fit_pattern(mask, 2), mask[:, :2, :2])
    with pytest.raises(ValueError, match="5 blocks is longer than the pattern, 3 blocks"):
        fit_pattern(mask, 5)
    wanted = grid("1 0 0 0 0\n1 1 0 0 0\n0 1 1 0 0\n0 0 1 1 0\n0 0 0 1 1").bool()
    assert torch.equal(fit_pattern(mask, 5, "diagonal")[0], wanted)


def draw_qk(heads: int, kv_heads: int, tokens: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    q, k = (torch.randn(batch, n, tokens, 4, dtype=torch.float64, generator=draw) for n in (heads, kv_heads))
    return q * 2, k


def whole_map(q: Tensor, k: Tensor, causal: bool, window: int | None) -> tuple[Tensor, Tensor]:
    """(mean map, visible) of one sequence."""
    t = q.shape[1]
    distance = torch.arange(t)[:, None] - torch.arange(t)
    visible = distance >= 0 if causal else torch.ones(t, t, dtype=torch.bool)
    visible = visible if window is None else visible & (distance.abs() < window)
    k = k.repeat_interleave(len(q) // len(k), 0)
    return reference.mean_map(q, k, visible, 0.5), visible


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_pooled_maps_equal_pooling_whole_maps(case: Case) -> None:
    q, k = case.tensors()
    block, edge = case.block, case.edge
    sums = pooled_maps(q, k, block=block, filter_edge=edge, causal=case.causal, scale=0.5, window=case.window)
    map_tt, visible = whole_map(q[0], k[0], case.causal, case.window)
    pad = -case.tokens % block

    def summed(x: Tensor) -> Tensor:
        return pool_blocks(torch.nn.functional.pad(x.double(), (0, pad, 0, pad)), block) * block**2

    torch.testing.assert_close(sums.raw_pnn[0], summed(map_tt))
    torch.testing.assert_close(sums.filtered_pnn[0], summed(diagonal_convolution(map_tt, edge)))
    torch.testing.assert_close(sums.pairs_nn, summed(visible))
    torch.testing.assert_close(sums.means()[0][0], summed(map_tt) / summed(visible).clamp(min=1))


def test_heads_rows_and_sequences_add_up() -> None:
    q, k = draw_qk(4, 2, 24, batch=2)
    common = {"block": 8, "filter_edge": 5, "causal": True, "scale": 0.5}
    both = pooled_maps(q, k, **common)
    apart = pooled_maps(q, k, **common, share_heads=False)
    torch.testing.assert_close(apart.raw_pnn.mean(0, keepdim=True), both.raw_pnn)
    rows = [pooled_maps(q[i : i + 1], k[i : i + 1], **common) for i in range(2)]
    torch.testing.assert_close((rows[0] + rows[1]).filtered_pnn, both.filtered_pnn)
    segments = torch.tensor([[0] * 3 + [1] * 11 + [2] * 8 + [0] * 2])
    packed = pooled_maps(q[:1], k[:1], **common, segments_bt=segments)
    alone = [pooled_maps(q[:1, :, a:z], k[:1, :, a:z], **common) for a, z in ((3, 14), (14, 22))]
    torch.testing.assert_close(packed.filtered_pnn, (alone[0] + alone[1]).filtered_pnn)
    assert torch.equal(packed.pairs_nn, (alone[0] + alone[1]).pairs_nn)


def test_row_normalise_weighs_all_rows_alike() -> None:
    q, k = draw_qk(2, 2, 24)
    q = torch.zeros_like(q)  # uniform attention: a row times its visible keys is all ones
    sums = pooled_maps(q, k, block=8, filter_edge=1, causal=True, scale=1.0, row_normalise=True)
    torch.testing.assert_close(sums.raw_pnn[0], sums.pairs_nn)


def test_no_whole_map_is_held() -> None:
    """Of 1,024 tokens and 4 heads, no tensor comes near the 1,048,576 numbers of one map."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    q, k = draw_qk(4, 4, 1024)
    with Largest() as largest:
        pooled_maps(q, k, block=32, filter_edge=31, causal=False, scale=0.5)
    assert largest.numel <= 3 * 32 * (1024 + 2 * 31) * 1.2
