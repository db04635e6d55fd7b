"""The course of a GPU's memory over a step, from the history that PyTorch's caching allocator keeps.

It holds what the tracer of tensors cannot see: what a kernel takes and gives back inside one operation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

MAX_ENTRIES = 1_000_000
"""Entries kept; a step of a 30-layer model makes about 20,000."""


@contextmanager
def allocator_history(device: torch.device) -> Iterator[list[tuple[float, int]]]:
    """A list, filled with (seconds into the block, allocated bytes) when the block ends; empty on a CPU."""
    found: list[tuple[float, int]] = []
    if device.type != "cuda":
        yield found
        return
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=MAX_ENTRIES)
    try:
        yield found
        torch.cuda.synchronize(device)
        snapshot: Any = torch.cuda.memory._snapshot(device)
        index = device.index if device.index is not None else torch.cuda.current_device()
        found += course(snapshot["device_traces"][index], before)
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def course(entries: list[dict[str, Any]], before: int) -> list[tuple[float, int]]:
    """(seconds, bytes) after every allocation and release.

    Args:
        entries: one device's trace: `action` (`alloc`, `free_completed`; others move no bytes), `size`, `time_us`.
        before: bytes allocated when the trace began.
    """
    signs = {"alloc": 1, "free_completed": -1}
    moved = [entry for entry in entries if entry["action"] in signs]
    start = moved[0].get("time_us", 0) if moved else 0
    points, held = [], before
    for entry in moved:
        held += signs[entry["action"]] * entry["size"]
        points.append(((entry.get("time_us", start) - start) / 1e6, held))
    return points
