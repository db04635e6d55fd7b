"""trace_step(): runs one training step and notes live bytes and work between the model's block boundaries.

A step is cut into segments: before the blocks, the forward of each block, head and loss (forward and backward), and
the backward of each block. Each segment knows the bytes that are live when it begins and ends, the most in between,
and its work. From one block of each kind, `memory.peak_bytes` walks the whole model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sparsetrain.core.anatomy import known_parts, submodule
from sparsetrain.core.host_memory import counting_moves
from sparsetrain.measure.memory import held_tensors, record_saved
from sparsetrain.planner.hollow import Hollow, tensors_in
from sparsetrain.planner.traced_step import Segment, StepTrace

_aten = torch.ops.aten
_EXPONENTIALS = ("softmax", "gelu", "silu", "sigmoid", "exp", "tanh")
_FREE = ("detach", "empty", "alias", "lift")


class LiveBytes:
    """Follows every tensor that comes to life inside the trace until its storage is freed."""

    def __init__(self, hollow: Hollow | None = None) -> None:
        self.hollow, self._on_host = hollow, 0 if hollow is None else hollow.to_host
        self.live = self.most = 0
        self._known: set[int] = set()
        self._work: dict[str, list[float]] = {}

    def know(self, tensors: Iterator[Tensor]) -> None:
        """These do not count: parameters, buffers, inputs."""
        self._held = [tensor.untyped_storage() for tensor in tensors]
        self._known.update(storage._cdata for storage in self._held)

    def after(self, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        results = tensors_in(out)
        for tensor in results:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                self._known.add(key)
                size = storage.nbytes()
                self.live += size
                weakref.finalize(storage, self._free, key, size)
        self.most = max(self.most, self.live)
        self._count(func, args, kwargs, out, results)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def _count(self, func: Any, args: tuple, kwargs: dict[str, Any], out: Any, results: list[Tensor]) -> None:
        name = _name(func)
        if _is_view(func) or name.startswith(_FREE) or not results:
            return
        given = tensors_in((args, kwargs))
        moved = float(sum(x.numel() * x.element_size() for x in [*given, *results]))
        kind, amount = "copy", 0.0
        counted = torch.ops.aten.addmm if name == "addmm_" else func._overloadpacket  # in place it is no other product
        if counted in flop_registry:
            kind = "attention" if "attention" in name else _product(given)
            amount = float(flop_registry[counted](*args, **kwargs, out_val=out))
        elif "grouped_mm" in name:  # rows by their experts: every row meets one matrix, forward and backward alike
            kind, amount = _product(given), 2.0 * args[0].numel() * args[1].shape[-1]
        elif "attention" in name:
            kind, amount = "attention", _attention_flops(name, args)
        elif any(word in name for word in _EXPONENTIALS):
            kind, amount = "exp", float(results[0].numel())
        if kind == "attention" and _is_causal(func, args, kwargs):
            amount /= 2
        total = self._work.setdefault(kind, [0.0, 0.0, 0.0])
        for i, value in enumerate((amount, moved, 1.0)):
            total[i] += value

    def cut(self, since: int) -> tuple[Segment, int]:
        """End a segment that began with `since` live bytes; returns it and what is live now."""
        if self.hollow is not None and (moved := self.hollow.to_host - self._on_host):
            self._work["host"], self._on_host = [0.0, float(moved), 1.0], self.hollow.to_host
        done = Segment(
            float(self.live - since),
            float(max(self.most, self.live) - since),
            {kind: (a, b, c) for kind, (a, b, c) in self._work.items()},
        )
        self._work, self.most = {}, self.live
        return done, self.live


def _product(given: list[Tensor]) -> str:
    """The kind of a matrix product. LoRA's are in fp32 in a bf16 model too, and take a fifth of the time of all."""
    return "gemm fp32" if given[0].dtype == torch.float32 else "gemm"


@cache
def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


@cache
def _name(func: Any) -> str:
    return func._schema.name.removeprefix("aten::")


def _is_causal(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    for i, argument in enumerate(func._schema.arguments):
        if argument.name == "is_causal":
            return bool(kwargs.get("is_causal", args[i] if i < len(args) else False))
    return False


def _attention_flops(name: str, args: tuple) -> float:
    """Two products of [t, d] and [d, s] a head forward, five backward (the CPU's kernels are not in the registry)."""
    q, k = (args[1], args[2]) if "backward" in name else (args[0], args[1])
    products = 5 if "backward" in name else 2
    return 2.0 * products * q.shape[:-1].numel() * k.shape[-2] * q.shape[-1]


def trace_step(model: nn.Module, step: Callable[[], Tensor], hollow: Hollow | None) -> StepTrace:
    """Run one forward and backward and cut it at the block boundaries.

    Args:
        model: on hollow parameters, or real ones (then the step is a real one, and the trace a measurement).
        step: runs model and loss and returns the loss.
        hollow: the mode that is active; None for a real step.
    """
    live = LiveBytes(hollow)
    live.know(_tensors_of(model))
    blocks = [submodule(model, block.name) for block in known_parts(model).blocks]
    with _cut_at(blocks, live) as segments:
        with _following(live, hollow), record_saved(model) as record:
            loss = step()
        with _following(live, hollow):
            segments.in_forward = False
            loss.backward()
            segments.finish()
    saved = record.result()
    inside = tuple({name: float(size) for name, size in saved.by_layer.get(i, {}).items()} for i in range(len(blocks)))
    outside = {name: size - sum(layer.get(name, 0.0) for layer in inside) for name, size in saved.by_component.items()}
    return StepTrace(
        before=segments.before[0] if blocks else Segment(0.0, 0.0),  # without blocks, all is the head's
        forward=tuple(segments.forward),
        head=segments.head[0],
        backward=tuple(reversed(segments.backward)),
        saved=outside,
        block_saved=inside,
    )


class _Segments:
    """What was cut so far. in_forward: set to False when the backward begins, where checkpointing runs blocks again."""

    def __init__(self, live: LiveBytes, num_blocks: int) -> None:
        self.live, self.num_blocks, self.in_forward = live, num_blocks, True
        self.before: list[Segment] = []
        self.forward: list[Segment] = []
        self.head: list[Segment] = []
        self.backward: list[Segment] = []
        self._since = 0

    def cut(self, into: list[Segment]) -> None:
        """End a segment here."""
        segment, self._since = self.live.cut(self._since)
        into.append(segment)

    def begins(self, *_: Any) -> None:
        """The first block begins."""
        if self.in_forward and not self.before:
            self.cut(self.before)

    def ends(self, _module: Any, _args: Any, out: Any) -> None:
        """A block ends."""
        if not self.in_forward:
            return
        self.cut(self.forward)
        index = len(self.forward) - 1
        tensor = out if isinstance(out, Tensor) else out[0]
        if tensor.requires_grad:
            tensor.register_hook(lambda _grad: self.arrives(index))

    def arrives(self, index: int) -> None:
        """The gradient of block `index`'s output is known: its backward begins."""
        self.cut(self.head if index == self.num_blocks - 1 else self.backward)

    def finish(self) -> None:
        """The backward is over. Blocks below all that trains had none."""
        self.cut(self.backward if self.head else self.head)
        self.backward += [Segment(0.0, 0.0)] * (self.num_blocks - len(self.backward))


@contextmanager
def _cut_at(blocks: list[nn.Module], live: LiveBytes) -> Iterator[_Segments]:
    """Inside, a step is cut where a block begins or ends."""
    segments = _Segments(live, len(blocks))
    hooks = [block.register_forward_pre_hook(segments.begins) for block in blocks[:1]]
    hooks += [block.register_forward_hook(segments.ends) for block in blocks]
    try:
        yield segments
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _following(live: LiveBytes, hollow: Hollow | None) -> Iterator[None]:
    if hollow is None:
        with _Follow(live):
            yield
        return
    hollow.after = live.after
    try:
        with hollow, counting_moves(hollow.moved):
            yield
    finally:
        hollow.after = None


class _Follow(TorchDispatchMode):
    """Follows a real step."""

    def __init__(self, live: LiveBytes) -> None:
        super().__init__()
        self.live = live

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.live.after(func, args, kwargs or {}, out)
        return out


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    yield from held_tensors(model)
