"""A weight as one integer, to notice that it is another than it was."""

from __future__ import annotations

import torch
from torch import Tensor

_SAMPLE, _ODD = 4096, 0x9E3779B1


@torch.no_grad()
def fingerprint(weight: Tensor) -> Tensor:
    """An integer that follows from some 4,096 entries of a weight, read as bf16; of the meta device, none.

    Another base, or an adapter that was merged, changes nearly every entry; bf16, so that the format may change.
    """
    if weight.is_meta:
        return torch.zeros((), dtype=torch.int64, device="meta")
    entries = weight.detach().reshape(-1)[:: weight.numel() // _SAMPLE | 1]
    bits = entries.cpu().to(torch.bfloat16).view(torch.int16).to(torch.int64)
    return ((bits + 2**15) * (torch.arange(1, 1 + len(bits)) * _ODD)).sum()
