"""Converting a dense FFN into a routed one: what is permuted, what is always on, and how much is lost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.methods.routed_ffn.convert import FFNWeights, convert_ffn
from sparsetrain.methods.routed_ffn.partition import always_on
from sparsetrain.methods.routed_ffn.regression import Ridge, with_constant

MASSIVE = 5
SIZES = {"num_shared": 8, "num_blocks": 4, "num_active": 1}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def clustered_ffn() -> tuple[FFNWeights, Tensor]:
    """40 ReLU units in 4 interleaved groups of 10, each of which fires on its own quarter of the tokens."""
    d, f, n = 12, 40, 400
    topic_gd = F.normalize(draw(4, d, seed=1), dim=1)
    x_nd = 3 * topic_gd[torch.arange(n) % 4] + 0.3 * draw(n, d, seed=2)
    up_fd = 0.3 * draw(f, d, seed=3) + 2 * topic_gd[torch.arange(f) % 4]
    bias_f = torch.full((f,), -3.0)
    return FFNWeights(up_fd, draw(d, f, seed=4), up_bias_f=bias_f, down_bias_d=draw(d, seed=5), activation="relu"), x_nd


def glu_ffn(d: int = 16, f: int = 56) -> tuple[FFNWeights, Tensor]:
    ffn = FFNWeights(draw(f, d, seed=1), draw(d, f, seed=2), draw(f, d, seed=3), activation="silu")
    return ffn, draw(500, d, seed=4) + 0.5


@pytest.mark.parametrize("compensation", ["none", "mean", "lowrank"])
def test_everything_active_is_the_dense_ffn(compensation: str) -> None:
    ffn, x_nd = glu_ffn()
    found = convert_ffn(ffn, x_nd, num_shared=8, num_blocks=4, num_active=4, compensation=compensation, rank=3)
    dense_nd = F.linear(ffn.hidden(x_nd), ffn.down_df)
    torch.testing.assert_close(found.apply(ffn, x_nd, 4), dense_nd, atol=2e-3, rtol=1e-4)
    assert found.stats["energy_kept"] == pytest.approx(1.0, abs=1e-5)
    assert found.stats["recall"] == 1.0


@pytest.mark.parametrize(("num_shared", "num_blocks"), [(0, 7), (8, 4), (11, 5), (55, 1)])
def test_order_is_a_permutation(num_shared: int, num_blocks: int) -> None:
    ffn, x_nd = glu_ffn()
    found = convert_ffn(ffn, x_nd, num_shared=num_shared, num_blocks=num_blocks, num_active=1, rank=2)
    assert torch.equal(found.order_f.sort().values, torch.arange(56))
    assert found.router_weight_gd.shape == (num_blocks, 16)
    assert found.block_shift_gd is not None and found.block_shift_gd.shape == (num_blocks, 16)


def test_planted_blocks_are_found_and_the_router_knows_them() -> None:
    ffn, x_nd = clustered_ffn()
    found = convert_ffn(ffn, x_nd, num_shared=0, num_blocks=4, num_active=1, compensation="none", generator=seeded())
    assert all(block.unique().numel() == 1 for block in (found.order_f % 4).reshape(4, 10))
    assert found.stats["recall"] > 0.9  # chance: 0.25


def test_router_beats_chance_without_structure() -> None:
    ffn, x_nd = glu_ffn()
    found = convert_ffn(ffn, x_nd, num_shared=8, num_blocks=8, num_active=2, rank=2)
    assert found.stats["recall"] > 0.3  # chance: 0.25


def test_units_of_a_massive_activation_are_always_on() -> None:
    """Unit 5 fires at token 17 alone, where it carries nearly everything; its mean energy is the smallest of all."""
    ffn, x_nd = glu_ffn()
    ffn.up_fd[:, 3] = 0.0
    ffn.up_fd[MASSIVE] = 0.0
    assert ffn.gate_fd is not None
    ffn.up_fd[MASSIVE, 3] = ffn.gate_fd[MASSIVE, 3] = 1.0
    x_nd[:, 3] = 0.0
    x_nd[17] = 100 * torch.eye(16)[3]
    weight_n = torch.ones(500)
    weight_n[17] = 1e-9  # as the residual stream's norm does to such a token
    found = convert_ffn(ffn, x_nd, **SIZES, rank=2, weight_n=weight_n)
    assert MASSIVE in found.order_f[:8].tolist()


def test_always_on_units_come_by_mean_but_for_the_massive() -> None:
    energy_nf = torch.arange(1.0, 11.0).expand(50, 10).clone()
    assert always_on(energy_nf, torch.ones(50), 2).tolist() == [8, 9]
    energy_nf[:, 0], energy_nf[7, 0] = 0.0, 300.0
    assert always_on(energy_nf, torch.ones(50), 2).tolist() == [0, 9]


def test_each_compensation_lowers_the_error() -> None:
    ffn, x_nd = glu_ffn()
    error = {}
    for compensation in ("none", "mean", "lowrank"):
        found = convert_ffn(ffn, x_nd, **SIZES, compensation=compensation, rank=6, generator=seeded())
        error[compensation] = found.stats["relative_error"]
    assert error["lowrank"] < 0.9 * error["mean"] and error["mean"] < error["none"]


def test_stats_are_those_of_the_masked_ffn() -> None:
    ffn, x_nd = glu_ffn()
    weight_n = draw(len(x_nd), seed=9).square()
    found = convert_ffn(ffn, x_nd, **SIZES, rank=3, weight_n=weight_n)
    dense_nd = F.linear(ffn.hidden(x_nd), ffn.down_df)
    mean_d = (weight_n @ dense_nd) / weight_n.sum()
    error = weight_n @ (found.apply(ffn, x_nd, 1) - dense_nd).square().sum(dim=1)
    spread = weight_n @ (dense_nd - mean_d).square().sum(dim=1)
    assert found.stats["relative_error"] == pytest.approx(float(error / spread), rel=1e-4)


def test_target_replaces_the_dense_output() -> None:
    ffn, x_nd = glu_ffn()
    wanted_nd = F.linear(ffn.hidden(x_nd), ffn.down_df) + 10 * x_nd @ draw(16, 2, seed=7) @ draw(2, 16, seed=8)
    plain = convert_ffn(ffn, x_nd, **SIZES, rank=8, generator=seeded())
    found = convert_ffn(ffn, x_nd, **SIZES, rank=8, target_nd=wanted_nd, generator=seeded())
    distance = [float((c.apply(ffn, x_nd, 1) - wanted_nd).square().mean()) for c in (plain, found)]
    assert distance[1] < 0.7 * distance[0]


def test_same_seed_same_conversion() -> None:
    ffn, x_nd = glu_ffn()
    first, second = (
        convert_ffn(ffn, x_nd, **SIZES, rank=3, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first.order_f, second.order_f)
    assert torch.equal(first.router_weight_gd, second.router_weight_gd)


def test_inputs_are_left_alone() -> None:
    ffn, x_nd = glu_ffn()
    before = [tensor.clone() for tensor in (ffn.up_fd, ffn.down_df, ffn.gate_fd, x_nd) if tensor is not None]
    convert_ffn(ffn, x_nd, **SIZES, rank=3)
    after = [tensor for tensor in (ffn.up_fd, ffn.down_df, ffn.gate_fd, x_nd) if tensor is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_shared": 9}, "do not divide"),
        ({"num_active": 5}, "outside 1..num_blocks=4"),
        ({"compensation": "median"}, "Choose none, mean or lowrank"),
        ({"rank": 17}, "outside 1..16"),
    ],
)
def test_errors_name_what_was_asked(change: dict, message: str) -> None:
    ffn, x_nd = glu_ffn()
    with pytest.raises(ValueError, match=message):
        convert_ffn(ffn, x_nd, **{**SIZES, **change})
    with pytest.raises(ValueError, match="calibration"):
        convert_ffn(ffn, x_nd[:3], **SIZES, rank=2)


def test_ridge_is_weighted_least_squares() -> None:
    x_np, y_no = with_constant(draw(60, 4, dtype=torch.float64)), draw(60, 3, seed=1, dtype=torch.float64)
    weight_n = draw(60, seed=2, dtype=torch.float64).square() + 0.1
    exact_po = torch.linalg.lstsq(x_np * weight_n.sqrt()[:, None], y_no * weight_n.sqrt()[:, None]).solution
    torch.testing.assert_close(Ridge(x_np, weight_n, penalty=0.0).fit(y_no), exact_po, atol=1e-4, rtol=1e-3)


def test_leading_directions_at_full_rank_are_the_whole_map() -> None:
    x_np, y_no = draw(60, 5), draw(60, 3, seed=1)
    ridge = Ridge(x_np, torch.ones(60))
    slope_po = ridge.fit(y_no)
    a_rd, b_dr = ridge.leading(slope_po, slice(0, 4), 3)
    torch.testing.assert_close((b_dr @ a_rd).T, slope_po[:4])
