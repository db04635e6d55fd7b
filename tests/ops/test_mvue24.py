"""MVUE: unbiased, two of four, and the published variances."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sparsetrain.ops.mvue24 import inclusion_probabilities, mvue24
from sparsetrain.ops.mvue24.cases import DTYPES, TINY, Case
from sparsetrain.ops.mvue24.reference import offset_of
from sparsetrain.ops.mvue24.torch import sliced_mvue

GROUP = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ordered_draws(x: Tensor) -> list[tuple[float, tuple[int, int]]]:
    """Probability of each of the 12 ordered draws of a group, from the definition."""
    a = (x.abs() + 1.19e-7 * (float(x.abs().max()) or 1.0)).tolist()
    total = sum(a)
    return [(a[i] / total * a[j] / (total - a[i]), (i, j)) for i, j in itertools.permutations(range(4), 2)]


@pytest.mark.parametrize("values", [[1.0, 2, 3, 4], [-1, 0, 0.5, 7], [0, 0, 0, 0], [1, 1, 1, 1], [0, -3, 0, 2]])
def test_enumerating_the_draws_gives_the_expectation_and_the_probabilities(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    p = inclusion_probabilities(x)
    drawn, expected = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for probability, pair in ordered_draws(x):
        for place in pair:
            drawn[place] += probability
            expected[place] += probability * x[place] / p[place]
    torch.testing.assert_close(drawn, p, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(expected, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(p.sum(), torch.tensor(2.0, dtype=torch.float64))


def test_reference_group() -> None:
    p = inclusion_probabilities(GROUP)
    torch.testing.assert_close(p, torch.tensor([0.234524, 0.441270, 0.608333, 0.715873]).double(), rtol=0, atol=1e-6)
    assert float((GROUP.square() * (1 / p - 1)).sum()) == pytest.approx(20.4736, abs=1e-4)
    torch.testing.assert_close(inclusion_probabilities(torch.ones(8)), torch.full((8,), 0.5))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_unbiased_with_the_stated_variance(backend: str) -> None:
    draws = 100_000
    x = GROUP[:, None].expand(4, draws)
    y = mvue24(x, generator=seeded(), backend=backend)
    assert ((y != 0).sum(0) == 2).all()
    p = inclusion_probabilities(GROUP)
    standard_error = (GROUP.square() * (1 / p - 1) / draws).sqrt()
    assert ((y.mean(1) - GROUP).abs() < 4 * standard_error).all()
    assert float((y - x).square().sum(0).mean()) == pytest.approx(20.4736, rel=0.02)
    kept = (y != 0).double().mean(1)
    torch.testing.assert_close(kept, p, rtol=0, atol=0.007)  # 4 standard errors


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_ways_of_drawing_agree(case: Case, dtype: torch.dtype) -> None:
    x = case.tensor(dtype)
    one, other = (mvue24(x, case.dim, generator=seeded(1), backend=backend) for backend in ("torch", "reference"))
    assert one.dtype == dtype
    assert torch.equal(one != 0, other != 0)
    torch.testing.assert_close(one, other)


def test_relative_error_on_gaussian_entries() -> None:
    x = torch.randn(2048, 64, generator=seeded())
    error = (mvue24(x, generator=seeded(1)) - x).square().sum() / x.square().sum()
    assert float(error) == pytest.approx(0.503, abs=0.01)


def test_two_nonzeros_and_fewer_come_back() -> None:
    x = torch.zeros(4, 30)
    x[1, :10], x[3, :20] = 2.5, -0.5
    torch.testing.assert_close(mvue24(x, generator=seeded()), x, rtol=2e-6, atol=0)


def starting_at(start: float) -> list[bool]:
    """Which entries of GROUP are kept when the intervals begin there."""
    x = GROUP.view(1, 4, 1)
    out = torch.empty_like(x)
    sliced_mvue(x, torch.tensor([start], dtype=x.dtype), torch.zeros(1, dtype=x.dtype), offset_of(x), out)
    return (out.flatten() != 0).tolist()


def test_every_start_keeps_two_and_each_entry_for_its_probability_of_them() -> None:
    kept = torch.tensor([starting_at((k + 0.5) / 5000) for k in range(10000)])
    assert (kept.sum(1) == 2).all()
    torch.testing.assert_close(kept.double().mean(0), inclusion_probabilities(GROUP), rtol=0, atol=4e-4)
    assert torch.equal(kept[:5000], kept[5000:]), "only the fraction of the start matters"


def test_errors_of_two_groups_are_uncorrelated() -> None:
    """Starts are sums of row and column numbers; pairwise independence is what the variance of dW needs."""
    x = torch.randn(8, 3, generator=seeded(), dtype=torch.float64)
    generator = seeded(1)
    errors = torch.stack([mvue24(x, generator=generator) - x for _ in range(20_000)])
    flat = errors.unflatten(1, (2, 4)).transpose(2, 3).flatten(1)  # 6 groups of 4
    scaled = flat / flat.std(0)
    correlation = scaled.t() @ scaled / len(scaled)
    groups = torch.arange(24) // 4
    apart = groups[:, None] != groups
    assert correlation[apart].abs().max() < 4.5 / len(scaled) ** 0.5
    assert correlation[~apart].abs().max() > 0.9


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_scale_does_not_change_the_draw(scale: float, backend: str) -> None:
    x = torch.randn(64, 33, generator=seeded())
    one, other = (mvue24(v, generator=seeded(1), backend=backend) for v in (x, x * scale))
    assert torch.equal(one != 0, other != 0)
    torch.testing.assert_close(other, one * scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_one_large_entry_in_a_group_does_not_cancel(backend: str) -> None:
    x = torch.tensor([1e4, 0, 0, 0, 3e4, 1e-3, 0, -1e-3, 1.0, 1e-9, 1e9, 0]).view(-1, 4).t().contiguous()
    y = torch.stack([mvue24(x, generator=seeded(s), backend=backend) for s in range(50)])
    assert y.isfinite().all()
    torch.testing.assert_close(y[:, 0, :2], x[0, :2].expand(50, 2), rtol=1e-3, atol=0)
    torch.testing.assert_close(y[:, 2, 2], x[2, 2].expand(50), rtol=1e-6, atol=0)


def test_tokens_without_gradient_stay_zero() -> None:
    x = torch.randn(12, 6, generator=seeded())
    x[5:9] = 0
    for seed in range(20):
        assert (mvue24(x, generator=seeded(seed))[5:9] == 0).all()


def test_an_incomplete_group_stays_dense_and_fewer_than_four_are_refused() -> None:
    x = torch.randn(11, 6, generator=seeded())
    y = mvue24(x, generator=seeded())
    assert torch.equal(y[8:], x[8:])
    assert ((y[:8].unflatten(0, (2, 4)) != 0).sum(1) == 2).all()
    with pytest.raises(ValueError, match="has 3 entries, and a group needs four"):
        mvue24(x[:3])


def test_the_generator_decides_and_the_global_one_is_left_alone() -> None:
    x = torch.randn(8, 6, generator=seeded())
    state = torch.random.get_rng_state()
    one, again = mvue24(x, generator=seeded(3)), mvue24(x, generator=seeded(3))
    assert torch.equal(one, again) and not torch.equal(one, mvue24(x, generator=seeded(4)))
    assert torch.equal(torch.random.get_rng_state(), state)
    stream = seeded(3)
    assert not torch.equal(mvue24(x, generator=stream), mvue24(x, generator=stream)), "each call draws anew"
