"""Tensors that wait in the CPU's memory between forward and backward, moved while the GPU computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sparsetrain.core.backend import tuned_for

_count: ContextVar[Callable[[int], None] | None] = ContextVar("sparsetrain_host_bytes", default=None)


@contextmanager
def counting_moves(count: Callable[[int], None]) -> Iterator[None]:
    """Inside, tensors without values leave the device and come back as on a GPU, and `count` is told the bytes."""
    token = _count.set(count)
    try:
        yield
    finally:
        _count.reset(token)


class OnHost:
    """Tensors that have left the device for pinned memory; on a CPU they stay where they are.

    The copy out runs beside what the device computes next. When the tensors of one block are asked back, those of the
    block before it, which the backward asks next, set out as well: two blocks' tensors are on the device then.

    Args:
        tensors: of one block.
        before: those that were moved before these, and come back after them.
    """

    def __init__(self, tensors: tuple[Tensor, ...], before: OnHost | None) -> None:
        self.before, self.count = before, _count.get()
        self.place = tensors[0].device
        self.moves = tuned_for(tensors[0]) == "cuda"
        self._back: tuple[Tensor, ...] | None = None
        self._ready: Any = None
        self._host = tuple(map(self._out, tensors)) if self.moves else tensors

    @contextmanager
    def on_device(self) -> Iterator[tuple[Tensor, ...]]:
        """The tensors, on the device again inside."""
        if not self.moves:
            yield self._host
            return
        if self.count is not None:
            ahead = self._empty() if self.before is not None else ()  # as of the block that sets out meanwhile
            found = self._empty()
            self.count(sum(x.numel() * x.element_size() for x in found))
            yield found
            del ahead
            return
        self._set_out()
        if self.before is not None:
            self.before._set_out()
        torch.cuda.current_stream(self.place).wait_event(self._ready)
        found, self._back = self._back, None
        assert found is not None
        yield found

    def _empty(self) -> tuple[Tensor, ...]:
        sizes: Any = self._host  # where nothing is moved but counted
        return tuple(torch.empty(shape, dtype=dtype, device=self.place) for shape, dtype in sizes)

    def _out(self, x: Tensor) -> Any:
        if self.count is not None:
            self.count(x.numel() * x.element_size())
            return x.shape, x.dtype
        side = _side_stream(self.place)
        side.wait_stream(torch.cuda.current_stream(self.place))
        with torch.cuda.stream(side):
            kept = torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
        x.record_stream(side)  # its memory is not used again before the copy is done
        return kept

    def _set_out(self) -> None:
        if self._back is not None:
            return
        found = tuple(torch.empty_like(x, device=self.place) for x in self._host)
        side = _side_stream(self.place)
        side.wait_stream(torch.cuda.current_stream(self.place))
        with torch.cuda.stream(side):
            for x, kept in zip(found, self._host, strict=True):
                x.copy_(kept, non_blocking=True)
                x.record_stream(side)
        self._back, self._ready = found, side.record_event()


@cache
def _side_stream(place: torch.device) -> Any:
    return torch.cuda.Stream(place)
