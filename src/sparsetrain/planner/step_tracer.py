"""trace_step(): runs one training step and notes live bytes and work between the model's block boundaries.

A step is cut into segments: before the blocks, the forward of each block, head and loss (forward and backward), and
the backward of each block. Each segment knows the bytes that are live when it begins and ends, the most in between,
and its work. From one block of each kind, `memory.peak_bytes` walks the whole model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sparsetrain.core.anatomy import describe, submodule
from sparsetrain.measure.memory import held_tensors, record_saved
from sparsetrain.planner.hollow import Hollow, tensors_in
from sparsetrain.planner.traced_step import Segment, StepTrace

_aten = torch.ops.aten
_EXPONENTIALS = ("softmax", "gelu", "silu", "sigmoid", "exp", "tanh")
_FREE = ("detach", "empty", "alias", "lift")


class LiveBytes:
    """Follows every tensor that comes to life inside the trace until its storage is freed."""

    def __init__(self) -> None:
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
        name = func._schema.name.removeprefix("aten::")
        if _is_view(func) or name.startswith(_FREE) or not results:
            return
        given = tensors_in((args, kwargs))
        moved = float(sum(x.numel() * x.element_size() for x in [*given, *results]))
        kind, amount = "copy", 0.0
        if func._overloadpacket in flop_registry:
            kind = "attention" if "attention" in name else "gemm"
            amount = float(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out))
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
        done = Segment(
            float(self.live - since),
            float(max(self.most, self.live) - since),
            {kind: (a, b, c) for kind, (a, b, c) in self._work.items()},
        )
        self._work, self.most = {}, self.live
        return done, self.live


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


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
    live = LiveBytes()
    live.know(_tensors_of(model))
    blocks = [submodule(model, block.name) for block in describe(model).blocks]
    forward: list[Segment] = []
    backward: list[Segment] = []
    head: list[Segment] = []
    since = 0

    def cut(into: list[Segment]) -> None:
        nonlocal since
        segment, since = live.cut(since)
        into.append(segment)

    before: list[Segment] = []
    phase = {"forward": True, "head": False}

    def begins(*_: Any) -> None:
        if phase["forward"] and not before:
            cut(before)

    def ends(_module: Any, _args: Any, out: Any) -> None:
        if not phase["forward"]:
            return
        cut(forward)
        index = len(forward) - 1
        tensor = out if isinstance(out, Tensor) else out[0]
        tensor.register_hook(lambda _grad, index=index: arrives(index))

    def arrives(index: int) -> None:
        """The gradient of block `index`'s output is known: its backward begins."""
        if index == len(blocks) - 1:
            cut(head)
        else:
            cut(backward)

    hooks = [blocks[0].register_forward_pre_hook(begins)]
    hooks += [block.register_forward_hook(ends) for block in blocks]
    try:
        with _following(live, hollow), record_saved(model) as record:
            loss = step()
        with _following(live, hollow):
            phase["forward"] = False
            loss.backward()
            cut(backward)
    finally:
        for hook in hooks:
            hook.remove()
    saved = record.result()
    inside = tuple({name: float(size) for name, size in saved.by_layer.get(i, {}).items()} for i in range(len(blocks)))
    outside = {name: size - sum(layer.get(name, 0.0) for layer in inside) for name, size in saved.by_component.items()}
    return StepTrace(
        before=before[0],
        forward=tuple(forward),
        head=head[0],
        backward=tuple(reversed(backward)),
        saved=outside,
        block_saved=inside,
    )


@contextmanager
def _following(live: LiveBytes, hollow: Hollow | None) -> Iterator[None]:
    if hollow is None:
        with _Follow(live):
            yield
        return
    hollow.after = live.after
    try:
        with hollow:
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
