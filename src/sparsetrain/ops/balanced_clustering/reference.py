"""Balanced clustering in plain PyTorch. Legend: n tokens, u units, g blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

PRICE_STEPS = 60
PRICE_DECAY = 0.95


def balanced_clustering(
    energy_nu: Tensor,
    block_u: Tensor,
    num_blocks: int,
    num_active: int,
    iterations: int,
    predict: Callable[[Tensor], Tensor] | None,
) -> Tensor:
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
