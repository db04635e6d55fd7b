"""The magnitude below which a given number of the entries of many tensors lie (SaRA, arXiv 2409.06633, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sparsetrain.ops.magnitude_threshold.histogram import by_histogram


def magnitude_threshold(tensors: Sequence[Tensor], rank: int) -> float:
    """θ = |w| of rank `rank` (counted from 0) over the entries of all tensors, in fp32: `rank` entries are below it.

    Fewer where several are equal to θ: `|w| < θ` is strict. `torch.quantile` refuses more than 2^24 entries.

    Equals: torch.cat([t.float().abs().flatten() for t in tensors]).sort().values[rank].

    Args:
        tensors: of any shapes and floating-point dtypes, with values.
        rank: in [0, number of entries).

    Raises:
        ValueError: a rank outside, integer weights, or weights on the meta device, which have no magnitudes.

    Cost: two passes over the tensors, and 8 bytes for each entry of the largest one, for a moment.
    """
    total = sum(t.numel() for t in tensors)
    if not 0 <= rank < total:
        raise ValueError(
            f"magnitude_threshold: rank={rank} of {total} entries. Give a rank from 0 to one below the number of them."
        )
    for t in tensors:
        if not t.is_floating_point() or t.is_meta:
            found = "on the meta device" if t.is_meta else str(t.dtype)
            raise ValueError(
                f"magnitude_threshold: a tensor {tuple(t.shape)} is {found}. Magnitudes need floating-point values; "
                "load or dequantise the weights first."
            )
    return by_histogram(tensors, rank)
