"""What a traced step is, as plain numbers: a stored one is read without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

Work = dict[str, tuple[float, float, float]]
"""Kind of operation (gemm, gemm fp32, attention, exp, copy; host: to the CPU's memory and back) -> (FLOPs, or
exponentials; bytes moved; calls)."""


@dataclass(frozen=True)
class Segment:
    """Bytes that the segment adds to what is live (negative: it frees), its peak above its beginning, and its work."""

    kept: float = 0.0
    peak: float = 0.0
    work: Work = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StepTrace:
    """What one traced step did.

    before: from the start of the forward to the first block. head: from the last block's end to its backward.
    forward, backward: of each traced block; backward[0] also holds what comes before the blocks.
    saved: component -> bytes saved for the backward outside the blocks; block_saved: the same of each traced block.
    """

    before: Segment
    forward: tuple[Segment, ...]
    head: Segment
    backward: tuple[Segment, ...]
    saved: dict[str, float]
    block_saved: tuple[dict[str, float], ...]
