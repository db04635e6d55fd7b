"""S-STE's closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsetrain.ops.soft_threshold24 import soft_scale24, soft_threshold24
from sparsetrain.ops.soft_threshold24.cases import DTYPES, TINY, Case
from sparsetrain.ops.soft_threshold24.reference import reference_scale


def weights(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize(
    ("group", "pruned", "beta"),
    [
        ([0.5, -2.0, 1.0, 3.0], [0.0, -1.0, 0.0, 2.0], 1.6),
        ([1.0, 1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 1.0], 2.0),
        ([1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 0.0], 1.0),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_reference_groups(group: list[float], pruned: list[float], beta: float, backend: str) -> None:
    w = torch.tensor(group)
    found = soft_threshold24(w, backend=backend)
    assert found.tolist() == pruned
    assert float(soft_scale24(w, found)) == pytest.approx(beta)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_sorting(case: Case, dtype: torch.dtype) -> None:
    w = case.tensor(dtype)
    found = soft_threshold24(w, case.dim)
    assert found.dtype == dtype
    assert torch.equal(found, soft_threshold24(w, case.dim, backend="reference"))
    assert ((found != 0).movedim(case.dim, -1).unflatten(-1, (-1, 4)).sum(-1) <= 2).all()


def test_continuous_also_across_ties() -> None:
    """S is Lipschitz with constant 2: each entry and the threshold move at most by the change of w."""
    w = weights(64, 64, dtype=torch.float64).round(decimals=1)  # many ties
    step = 1e-3 * torch.randn(64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = (soft_threshold24(w + step) - soft_threshold24(w)).abs().max()
    assert moved <= 2 * step.abs().max() + 1e-12


def test_homogeneous_and_idempotent() -> None:
    w = weights(16, 32)
    pruned = soft_threshold24(w)
    assert torch.equal(soft_threshold24(-4 * w), -4 * pruned)
    assert torch.equal(soft_threshold24(pruned), pruned)


def test_beta_minimises_the_distance_and_ignores_the_scale() -> None:
    w = weights(256, 256)
    pruned = soft_threshold24(w)
    beta = soft_scale24(w, pruned)
    torch.testing.assert_close(beta, reference_scale(w, pruned))
    for other in (beta - 0.01, beta + 0.01):
        assert (w - other * pruned).norm() > (w - beta * pruned).norm()
    torch.testing.assert_close(soft_scale24(8 * w, soft_threshold24(8 * w)), beta)
    assert float(beta) == pytest.approx(1.483, abs=0.01)
    assert float((w - beta * pruned).square().sum() / w.square().sum()) == pytest.approx(0.258, abs=0.005)


def test_a_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="not a multiple of 4"):
        soft_threshold24(weights(4, 6))
