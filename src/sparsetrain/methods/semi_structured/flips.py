"""Flip rates, and proof that all ranks of a run hold the same masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain.core import ranks
from sparsetrain.surgery.apply import Handle


def schedules(handle: Handle) -> dict[str, Any]:
    """Site -> `Schedule24` of a handle, without the sites of other methods."""
    return dict(handle.sites("semi_structured"))


def flip_curve(handle: Handle) -> dict[str, list[tuple[int, float]]]:
    """Site -> (optimizer step, r) of every refresh, and the mean over sites under `mean`.

    r = ‖M_new − M_old‖₁ / D between consecutive refreshes, 0 at the first, averaged over the linears of an FFN. Healthy
    curves rise early and then fall as in a dense run (`dense_tail_ratio=1` counts that one's virtual flips).

    Raises:
        ValueError: the handle has no site of this method.
    """
    sites = schedules(handle)
    if not sites:
        raise ValueError("flip_curve: no site of this handle is 'semi_structured'. Convert with SemiStructured().")
    curves = {
        site: [(int(row[0]), sum(row[1:]) / len(row[1:])) for row in schedule.history]
        for site, schedule in sites.items()
    }
    together = list(zip(*curves.values()))
    mean = [(rows[0][0], sum(rate for _, rate in rows) / len(rows)) for rows in together]
    return {"mean": mean, **curves}


def mask_digest(*masks: Tensor) -> int:
    """A 64-bit hash of masks: equal masks give equal numbers, whatever the machine."""
    total = 0
    for mask in masks:
        flat = mask.contiguous().flatten().view(torch.uint8)
        padded = torch.cat([flat, flat.new_zeros(-len(flat) % 8)])
        words = padded.view(torch.int64)
        # odd multipliers, different at each place; int64 arithmetic wraps around
        odd = torch.arange(len(words), device=words.device).mul_(0x9E3779B97F4A7C1 * 2).add_(1)
        total = (total * 1_000_003 + int((words * odd).sum())) % (1 << 63)
    return total


def check_ranks_agree(masks: list[Tensor]) -> None:
    """Raise RuntimeError if another data-parallel rank holds other masks; weights differ then."""
    if ranks.size() == 1:
        return
    own = torch.tensor([mask_digest(*masks)], device=masks[0].device)
    found = [int(digest) for digest in ranks.all_gather(own)]
    if len(set(found)) > 1:
        raise RuntimeError(
            f"2:4 masks differ between ranks (digests {found}), so the ranks hold different weights. Masks need the "
            "whole weight on every rank: use DDP, and load the same checkpoint everywhere."
        )
