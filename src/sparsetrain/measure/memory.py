"""Where training memory goes: activations saved for the backward pass by component, the exact static parts, the peak.

Saved activations are counted through `torch.autograd.graph.saved_tensors_hooks`: each untyped storage once and in full,
for the part of the model that saved it first, and only if the graph still holds it when the forward is over. Storages
of parameters and buffers do not count (`weight.t()` is no Parameter, but shares its storage). The hooks see what
PyTorch's own operations and `ctx.save_for_backward` keep; a tensor kept as `ctx.x = ...` is invisible to them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sparsetrain.measure.components import COMPONENTS, Locates, Place, running
from sparsetrain.surgery.site import Site


@dataclass(frozen=True, kw_only=True)
class SavedActivations:
    """Bytes kept for the backward pass: `by_component` everything, `by_layer` what was saved inside the blocks."""

    by_component: dict[str, int]
    by_layer: dict[int, dict[str, int]]
    num_storages: int

    @property
    def total(self) -> int:
        return sum(self.by_component.values())

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True, kw_only=True)
class StaticMemory:
    """Bytes that stay from step to step, read from the real objects; each storage once."""

    parameters_trainable: int
    parameters_frozen: int
    buffers: int
    gradients: int
    optimizer_trainable: int
    optimizer_frozen: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Resident memory of this process (Linux only) and PyTorch's own count on CUDA, in bytes; None where unknown."""

    rss_bytes: int | None = None
    rss_peak_bytes: int | None = None
    gpu_allocated_peak_bytes: int | None = None
    gpu_reserved_peak_bytes: int | None = None

    def to_dict(self) -> dict[str, int | None]:
        return asdict(self)


class Saved:
    """What the graph holds in place of a saved tensor; it lives exactly as long as the graph needs it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        # detached, or the graph would hold a reference to itself
        self.tensor = tensor.detach()


@dataclass
class SavedRecord:
    """A running count; `result()` reads it while the graph is alive, and is final once the `with` block has ended."""

    _model: nn.Module
    _now: Locates
    _seen: list[tuple[weakref.ref[Saved], Place]] = field(default_factory=list)
    _result: SavedActivations | None = None

    def result(self) -> SavedActivations:
        return self._result if self._result is not None else self._count()

    def pack(self, tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        self._seen.append((weakref.ref(saved), self._now.place))
        return saved

    def _count(self) -> SavedActivations:
        # read at the end: a buffer that the forward replaced is held by the graph alone, and counts
        counted = {key for tensor in model_tensors(self._model) for key, _ in storages_of(tensor)}
        by_component = dict.fromkeys(COMPONENTS, 0)
        by_layer: dict[int, dict[str, int]] = {}
        num_storages = 0
        for reference, place in self._seen:
            if (saved := reference()) is None:
                continue
            for key, num_bytes in storages_of(saved.tensor):
                if key in counted:
                    continue
                counted.add(key)
                num_storages += 1
                by_component[place.component] += num_bytes
                if place.layer is not None:
                    layer = by_layer.setdefault(place.layer, {})
                    layer[place.component] = layer.get(place.component, 0) + num_bytes
        layers = dict(sorted(by_layer.items()))
        return SavedActivations(by_component=by_component, by_layer=layers, num_storages=num_storages)


@contextmanager
def record_saved(model: nn.Module) -> Iterator[SavedRecord]:
    """Count what a forward inside the `with` block keeps for its backward. The backward belongs after the block.

        with record_saved(model) as record:
            loss = model(**batch).loss
        record.result().by_component
        loss.backward()

    Keep the loss until the block has ended: what no graph holds is not counted. Under gradient checkpointing, the
    inputs kept for the recomputation are counted, and what is recomputed is not.

    Raises:
        UnknownFamily: no anatomy adapter knows the model.
    """
    with running(model) as now:
        record = SavedRecord(model, now)
        with saved_tensors_hooks(record.pack, lambda saved: saved.tensor):
            yield record
        record._result = record._count()
        record._seen.clear()


def saved_activations(model: nn.Module, forward: Callable[[], Any]) -> SavedActivations:
    """Bytes that one call of `forward` keeps for its backward, by component and by layer.

    Args:
        model: the model whose modules run in `forward`.
        forward: runs the model and the loss, and returns something that holds the graph (the loss).

    Raises:
        UnknownFamily: no anatomy adapter knows the model.
        ValueError: nothing returned by `forward` requires a gradient, so nothing is saved.
    """
    with record_saved(model) as record:
        kept = forward()
        if not any(tensor.requires_grad for tensor in tensors_in(kept)):
            raise ValueError(
                "the forward returned no tensor that requires a gradient, so nothing is saved for a backward pass. "
                "Return the loss, make some parameter trainable, and leave torch.no_grad()."
            )
    return record.result()


def static_memory(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> StaticMemory:
    """Parameters, buffers, gradients and optimizer state as they are now.

    A gradient or a state exists only after a backward and a step. Tied parameters count once, as trainable if any
    parameter with that storage is.
    """
    seen: set[int] = set()

    def new_bytes(tensors: Iterable[Tensor]) -> int:
        total = 0
        for key, num_bytes in (pair for tensor in tensors for pair in storages_of(tensor)):
            total += 0 if key in seen else num_bytes
            seen.add(key)
        return total

    params = list(model.parameters())
    trainable = [param for param in params if param.requires_grad]
    frozen = [param for param in params if not param.requires_grad]
    state: Any = {} if optimizer is None else optimizer.state
    return StaticMemory(
        parameters_trainable=new_bytes(trainable),
        parameters_frozen=new_bytes(frozen),
        buffers=new_bytes([*model.buffers(), *held_tensors(model)]),
        gradients=new_bytes(param.grad for param in params if param.grad is not None),
        optimizer_trainable=new_bytes(tensors_in([value for param, value in state.items() if param.requires_grad])),
        optimizer_frozen=new_bytes(tensors_in([value for param, value in state.items() if not param.requires_grad])),
    )


def peak_memory(device: torch.device | str | None = None) -> PeakMemory:
    """The peak since the process began, or since `reset_peak`; the GPU's figures when `device` is a CUDA device."""
    status = _proc_status()
    gpu = None if device is None or torch.device(device).type != "cuda" else torch.device(device)
    return PeakMemory(
        rss_bytes=status.get("VmRSS"),
        rss_peak_bytes=status.get("VmHWM"),
        gpu_allocated_peak_bytes=None if gpu is None else torch.cuda.max_memory_allocated(gpu),
        gpu_reserved_peak_bytes=None if gpu is None else torch.cuda.max_memory_reserved(gpu),
    )


def reset_peak(device: torch.device | str | None = None) -> bool:
    """Start the peak anew; True if the resident peak could be reset (Linux lets a process do so for itself).

    Pages that an allocator keeps from earlier work stay resident: compare two runs in two fresh processes.
    """
    if device is not None and torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(torch.device(device))
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def release_free_pages() -> None:
    """Collect garbage, and let glibc give its free pages back, so that what is resident is in use."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _proc_status() -> dict[str, int]:
    """VmRSS and VmHWM in bytes. Not `ru_maxrss`, which a child inherits from its parent across exec."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines if line.startswith(("VmRSS:", "VmHWM:")))
    return {name.rstrip(":"): int(kilobytes) * 1024 for name, kilobytes, _ in pairs}


def model_tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    yield from held_tensors(model)


def held_tensors(model: nn.Module) -> Iterator[Tensor]:
    """What modules keep from step to step outside parameters and buffers (packed weights), as `held_tensors` says."""
    for module in model.modules():
        if isinstance(module, Site):
            yield from module.held_tensors()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor inside nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def storages_of(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """(identity, bytes) of the storages behind a tensor; the identity is unique while the storage lives."""
    if hasattr(tensor, "__tensor_flatten__"):  # 2:4 weights, DTensor, jagged
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            yield from storages_of(getattr(tensor, name))
    elif tensor.layout == torch.sparse_coo:
        yield from storages_of(tensor._indices())
        yield from storages_of(tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values()):
            yield from storages_of(part)
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        for part in (tensor.ccol_indices(), tensor.row_indices(), tensor.values()):
            yield from storages_of(part)
    else:
        storage = tensor.untyped_storage()
        # not data_ptr(): every storage on the meta device has 0
        yield storage._cdata, storage.nbytes()
