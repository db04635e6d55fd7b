"""Cutting hidden units into equal blocks so that few blocks a token carry most of its energy.

Legend: n tokens, u units, g blocks, k blocks a token uses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

PRICE_STEPS = 60
PRICE_DECAY = 0.95


def balanced_clustering(
    energy_nu: Tensor,
    num_blocks: int,
    num_active: int,
    *,
    iterations: int = 8,
    generator: torch.Generator | None = None,
    start_u: Tensor | None = None,
    predict: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Equal blocks that maximise the energy inside the blocks each token uses, by coordinate ascent.

    maximise  sum_n sum_{g in S(n)} E_ng   over the assignment,  E_ng = sum_{u in g} energy_nu,
    S(n) = the k largest E_ng, or the k largest predict(E)_ng.

    Equals, repeated:
        total_ng = energy_nu @ one_hot(block_u)
        used_ng = top-k mask of predict(total_ng)
        block_u = balanced_assignment(energy_nu.T @ used_ng)

    Balanced k-means on co-activation, as in MoEfication (arXiv 2110.01786, section 3.1), does not see how many blocks a
    token may use; this does. With `predict` set to a router's regression, units gather where that router finds them.

    Args:
        energy_nu: [n, u], not negative.
        num_blocks: g, which divides u.
        num_active: k, in 1..g.
        iterations: at most so many rounds; fewer if nothing moves.
        generator: of the random start.
        start_u: [u], blocks to start from instead.
        predict: [n, g] -> [n, g], what decides which blocks a token uses; the energies themselves if None.

    Returns:
        block_u [u] int64, each block u / g times.

    Raises:
        ValueError: u does not divide into g, or k is outside 1..g.

    Cost: 4 n u g FLOP a round, and one argmax over [u, g] for each step of the assignment.
    """
    num_units = energy_nu.shape[1]
    _check_blocks(num_units, num_blocks)
    if not 1 <= num_active <= num_blocks:
        raise ValueError(f"num_active={num_active} is outside 1..num_blocks={num_blocks}.")
    if start_u is None:
        start_u = torch.randperm(num_units, generator=generator).to(energy_nu.device) % num_blocks
    block_u = start_u
    for _ in range(iterations):
        total_ng = energy_nu @ F.one_hot(block_u, num_blocks).to(energy_nu.dtype)
        guess_ng = total_ng if predict is None else predict(total_ng)
        used_ng = torch.zeros_like(total_ng).scatter_(1, guess_ng.topk(num_active, dim=1).indices, 1.0)
        moved_u = balanced_assignment(energy_nu.T @ used_ng)
        if torch.equal(moved_u, block_u):
            break
        block_u = moved_u
    return block_u


def balanced_assignment(score_ug: Tensor) -> Tensor:
    """Each unit to one block, all blocks equally full, with a large total score: prices, then filling by need.

    Equals, up to a small gap: the optimal transport plan of score_ug with equal column sums.

    Args:
        score_ug: [u, g]; g divides u.

    Returns:
        block_u [u] int64.

    Raises:
        ValueError: u does not divide into g.
    """
    _check_blocks(*score_ug.shape)
    num_units, num_blocks = score_ug.shape
    room = num_units // num_blocks
    # relative to the spread, so that steps of one price unit fit scores of any scale
    score_ug = (score_ug - score_ug.mean()).float() / score_ug.float().std(correction=0).clamp_min(1e-30)
    price_g = score_ug.new_zeros(num_blocks)
    step = 1.0
    for _ in range(PRICE_STEPS):
        block_u = (score_ug - price_g).argmax(dim=1)
        load_g = torch.bincount(block_u, minlength=num_blocks)
        if bool((load_g == room).all()):
            return block_u
        price_g += step * (load_g - room) / room
        step *= PRICE_DECAY
    return _fill(score_ug - price_g, room)


def _check_blocks(num_units: int, num_blocks: int) -> None:
    if num_blocks < 1 or num_units % num_blocks:
        raise ValueError(f"{num_units} units do not divide into {num_blocks} equal blocks. Choose a divisor.")


def _fill(worth_ug: Tensor, room: int) -> Tensor:
    """Greedy: units that lose most by their second choice come first and take the best block with room left."""
    num_units, num_blocks = worth_ug.shape
    best_u2 = worth_ug.topk(min(2, num_blocks), dim=1).values
    need_u = (best_u2[:, 0] - best_u2[:, -1]).argsort(descending=True, stable=True)
    wishes_ug = worth_ug.argsort(dim=1, descending=True, stable=True).tolist()
    left, chosen = [room] * num_blocks, [0] * num_units
    for unit in need_u.tolist():
        block = next(g for g in wishes_ug[unit] if left[g])
        chosen[unit], left[block] = block, left[block] - 1
    return torch.tensor(chosen, device=worth_ug.device)
