"""The memory that tensors hold at every moment of a training step: the peak, what it is made of, and its course.

Every operation's outputs are seen as they are made; a storage counts from then until it is freed. Parts move as their
use shows: what the backward will read is `saved`, what becomes a `.grad` is a gradient, the rest is temporary. What a
kernel allocates and frees inside one operation is not seen here: the process's resident peak, and a GPU's allocator,
hold that too.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from sparsetrain.measure.components import Place
from sparsetrain.measure.follow import Following
from sparsetrain.measure.memory import Saved, SavedActivations, SavedRecord, model_tensors, storages_of, tensors_in

PARTS = ("weights", "optimizer", "gradients", "saved", "temporary")


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Bytes alive `at_s` seconds into the step, by part (those of `PARTS`)."""

    at_s: float
    phase: str
    bytes_by_part: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.bytes_by_part.values())


@dataclass(frozen=True, kw_only=True)
class LiveMemory:
    """One step: its highest moment, who was at work then, and its course (at most 400 moments, peaks kept).

    temporary_peak_bytes: the most that was neither weight, state, gradient nor saved for the backward.
    """

    peak: Moment
    peak_component: str
    peak_layer: int | None
    temporary_peak_bytes: int
    moments: tuple[Moment, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Block:
    num_bytes: int
    part: str
    reference: weakref.ref[Any] | None = None


class LiveRecord(TorchDispatchMode):
    """A running count; `result()` once the step is over. `saved` is set when the first backward begins."""

    saved: SavedActivations | None = None

    def __init__(self, model: nn.Module, following: Following) -> None:
        super().__init__()
        self._following = following
        self._blocks: dict[int, _Block] = {}
        self._now: dict[str, int] = dict.fromkeys(PARTS, 0)
        self._peak: Moment | None = None
        self._peak_place = Place("other")
        self._temporary = 0
        self._moments: list[Moment] = []
        self._begin = time.perf_counter()
        self._saved = SavedRecord(model, following)
        following.on_backward = self._backward_begins
        for tensor in model_tensors(model):
            self._see(tensor, "weights")
        for parameter in model.parameters():
            if parameter.grad is not None:
                self._see(parameter.grad, "gradients")

    def hold(self, optimizer: Any) -> None:
        """Count an optimizer's state."""
        for tensor in tensors_in(list(optimizer.state.values())):
            self._see(tensor, "optimizer")

    def _begin_step(self) -> None:
        self._moments.clear()  # those of counting what was there already
        self._begin, self._peak, self._temporary = time.perf_counter(), None, 0
        self._count("weights", 0)

    def result(self) -> LiveMemory:
        assert self._peak is not None
        return LiveMemory(
            peak=self._peak,
            peak_component=self._peak_place.component,
            peak_layer=self._peak_place.layer,
            temporary_peak_bytes=self._temporary,
            moments=tuple(_thinned(self._moments, 400)),
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            self._see(tensor, "temporary")
        return out

    def _see(self, tensor: Tensor, part: str) -> None:
        for storage in _untyped(tensor):
            key = storage._cdata
            if key in self._blocks:
                continue
            block = _Block(storage.nbytes(), part)
            block.reference = weakref.ref(storage, lambda _, key=key: self._freed(key))
            self._blocks[key] = block
            self._count(part, block.num_bytes)

    def _freed(self, key: int) -> None:
        if (block := self._blocks.pop(key, None)) is not None:
            self._count(block.part, -block.num_bytes)

    def _move(self, tensor: Tensor, part: str) -> None:
        for key, _ in storages_of(tensor):
            block = self._blocks.get(key)
            if block is not None and block.part == "temporary":
                self._now[block.part] -= block.num_bytes
                block.part = part
                self._now[part] += block.num_bytes

    def _count(self, part: str, num_bytes: int) -> None:
        self._now[part] += num_bytes
        moment = Moment(
            at_s=time.perf_counter() - self._begin, phase=self._following.phase, bytes_by_part=dict(self._now)
        )
        self._moments.append(moment)
        self._temporary = max(self._temporary, self._now["temporary"])
        if self._peak is None or moment.total > self._peak.total:
            self._peak, self._peak_place = moment, self._following.place

    def pack(self, tensor: Tensor) -> Saved:
        if self._following.phase != "forward":  # computed again, or for a second derivative: gone within the backward
            return Saved(tensor)
        self._move(tensor, "saved")
        return self._saved.pack(tensor)

    def unpack(self, saved: Saved) -> Tensor:
        self._following.backward_begins()  # a loss outside the model is read before any node that is hooked
        return saved.tensor

    def _backward_begins(self) -> None:
        counted = self._saved.result()
        if self.saved is None or counted.total > self.saved.total:  # of several passes in a step, the largest
            self.saved = counted


def _untyped(tensor: Tensor) -> Iterator[Any]:
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            yield from _untyped(getattr(tensor, name))
    elif tensor.layout == torch.strided:
        yield tensor.untyped_storage()


def _thinned(moments: list[Moment], most: int) -> Iterator[Moment]:
    """At most `most` moments: of each stretch the highest one."""
    stretch = -(-len(moments) // most) if moments else 1
    for start in range(0, len(moments), stretch):
        yield max(moments[start : start + stretch], key=lambda moment: moment.total)


@contextmanager
def live_memory(model: nn.Module, following: Following, optimizers: list[Any]) -> Iterator[LiveRecord]:
    """Trace the one training step inside the `with` block; `result()` is final after it.

    Args:
        following: of the same model, active around this.
        optimizers: those whose state exists already.
    """
    record = LiveRecord(model, following)
    for optimizer in optimizers:
        record.hold(optimizer)
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p: record._move(p.grad, "gradients"))
        for parameter in model.parameters()
        if parameter.requires_grad and parameter.is_leaf
    ]
    try:
        record._begin_step()
        with saved_tensors_hooks(record.pack, record.unpack), record:
            yield record
    finally:
        following.on_backward = None
        for hook in hooks:
            hook.remove()
        for block in record._blocks.values():
            block.reference = None
