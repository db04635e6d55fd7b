"""Balanced clustering: blocks are equal, planted ones are found, and the objective never falls below the start's."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sparsetrain.ops.balanced_clustering import balanced_assignment, balanced_clustering


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    tokens: int
    units: int
    blocks: int
    active: int

    def planted(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """(energy [n, u], true block [u]): a token excites the units of `active` blocks 20 times as much as others."""
        draw = torch.Generator().manual_seed(seed)
        block_u = torch.randperm(self.units, generator=draw) % self.blocks
        order_ng = torch.rand(self.tokens, self.blocks, generator=draw)
        used_ng = torch.zeros(self.tokens, self.blocks).scatter_(1, order_ng.topk(self.active).indices, 1.0)
        noise_nu = torch.rand(self.tokens, self.units, generator=draw)
        return noise_nu * (0.05 + used_ng[:, block_u]), block_u


CASES = (
    Case(name="four", tokens=200, units=32, blocks=4, active=1),
    Case(name="six", tokens=300, units=42, blocks=6, active=2),
    Case(name="one", tokens=10, units=8, blocks=1, active=1),
)


def captured(energy_nu: Tensor, block_u: Tensor, num_blocks: int, num_active: int) -> float:
    total_ng = torch.stack([energy_nu[:, block_u == g].sum(dim=1) for g in range(num_blocks)], dim=1)
    return float(total_ng.topk(num_active, dim=1).values.sum() / energy_nu.sum())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_planted_blocks_are_found(case: Case) -> None:
    energy_nu, truth_u = case.planted()
    found_u = balanced_clustering(
        energy_nu, case.blocks, case.active, iterations=20, generator=torch.Generator().manual_seed(0)
    )
    assert found_u.bincount(minlength=case.blocks).eq(case.units // case.blocks).all()
    best = captured(energy_nu, truth_u, case.blocks, case.active)
    start = captured(energy_nu, torch.arange(case.units) % case.blocks, case.blocks, case.active)
    got = captured(energy_nu, found_u, case.blocks, case.active)
    assert got >= start + 0.8 * (best - start)


def test_assignment_is_close_to_the_best_of_all() -> None:
    """6 units in 3 pairs: all 90 assignments can be tried."""
    for seed in range(20):
        score_ug = torch.rand(6, 3, generator=torch.Generator().manual_seed(seed))
        found = score_ug.gather(1, balanced_assignment(score_ug)[:, None]).sum()
        choices = set(itertools.permutations((0, 0, 1, 1, 2, 2)))
        best = max(sum(score_ug[u, g] for u, g in enumerate(choice)) for choice in choices)
        assert found >= 0.85 * best


@pytest.mark.parametrize("score", [0.0, 1e30, 1e-30])
def test_assignment_is_balanced_whatever_the_scale(score: float) -> None:
    score_ug = torch.rand(20, 5, generator=torch.Generator().manual_seed(0)) * score
    assert balanced_assignment(score_ug).bincount(minlength=5).eq(4).all()


def test_predict_decides_which_blocks_count() -> None:
    """A router that always answers `block 0` draws the units of most energy into block 0."""
    energy_nu = torch.rand(50, 12, generator=torch.Generator().manual_seed(0)) + torch.arange(12)
    first = torch.tensor([1.0, 0.0, 0.0]).expand(50, 3)
    block_u = balanced_clustering(energy_nu, 3, 1, iterations=3, start_u=torch.arange(12) % 3, predict=lambda _: first)
    assert block_u[8:].eq(0).all()


def test_errors() -> None:
    with pytest.raises(ValueError, match="7 units do not divide into 2"):
        balanced_clustering(torch.ones(3, 7), 2, 1)
    with pytest.raises(ValueError, match="num_active=3 is outside"):
        balanced_clustering(torch.ones(3, 8), 2, 3)
    with pytest.raises(ValueError, match="do not divide"):
        balanced_assignment(torch.ones(7, 2))
