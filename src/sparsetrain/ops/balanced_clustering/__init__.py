"""Cutting hidden units into equal blocks so that few blocks a token carry most of its energy.

Legend: n tokens, u units, g blocks, k blocks a token uses.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsetrain.ops.balanced_clustering import reference


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
    return reference.balanced_clustering(energy_nu, start_u, num_blocks, num_active, iterations, predict)


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
    return reference.balanced_assignment(score_ug)


def _check_blocks(num_units: int, num_blocks: int) -> None:
    if num_blocks < 1 or num_units % num_blocks:
        raise ValueError(f"{num_units} units do not divide into {num_blocks} equal blocks. Choose a divisor.")
