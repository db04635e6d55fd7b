"""Which implementation of an op runs: `auto`, `reference`, `torch` (faster, in plain PyTorch), `triton`; PyTorch's own
GPU kernels `flex` (FlexAttention), `varlen` and `grouped_mm`; for 2:4 products also `emulate` (dense matmuls of the
pruned weight, anywhere) and torch core's `cusparselt` and `cutlass`.

`auto` may fall back and can say why; a backend that was asked for by name never falls back.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from sparsetrain.core.errors import Unsupported

if TYPE_CHECKING:
    from torch import Tensor, device

BACKENDS = (
    "auto", "reference", "torch", "flex", "grouped_mm", "triton", "sdpa", "varlen", "emulate", "cusparselt", "cutlass",
)  # fmt: skip
Ran = dict[str, set[str]]
"""Op -> the backends that were chosen for it."""
_asked: ContextVar[str] = ContextVar("sparsetrain_backend", default="auto")

_watched: ContextVar[Ran | None] = ContextVar("sparsetrain_watched", default=None)
_planned: ContextVar[str | None] = ContextVar("sparsetrain_planned", default=None)
_here: ContextVar[str | None] = ContextVar("sparsetrain_here", default=None)


@contextmanager
def _holding(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def planning_for(device: str) -> AbstractContextManager[None]:
    """Let ops on hollow tensors, which are all on the CPU, choose their tiles as on that type of device."""
    return _holding(_planned, device)


def timing_on(device: str) -> AbstractContextManager[None]:
    """Let what is planned on the meta device be timed on this device, on which it would run."""
    return _holding(_here, device)


def timed_on(x: Tensor) -> str | None:
    """The device on which work on `x` can be timed: its own; of a meta tensor that of `timing_on`, None outside it."""
    return _here.get() if x.is_meta else str(x.device)


def tuned_for(x: Tensor) -> str:
    """The type of device that an op on `x` is tuned for: where `x` is, or what is being planned for."""
    return _planned.get() or x.device.type


def is_planned(x: Tensor) -> bool:
    """Does `x` stand, without values, for a tensor on another type of device?"""
    return _planned.get() not in (None, x.device.type)


@contextmanager
def watch_ops(ran: Ran | None = None) -> Iterator[Ran]:
    """Collect the ops that choose a backend inside the `with` block, and which, in `ran` if it is given."""
    found, outer = {} if ran is None else ran, _watched.get()
    try:
        with _holding(_watched, found):
            yield found
    finally:
        if outer is not None:
            for op, names in found.items():
                outer.setdefault(op, set()).update(names)


def use_backend(name: str) -> AbstractContextManager[None]:
    """Ask for a backend in every op called inside the `with` block.

    Raises:
        ValueError: `name` is not one of `BACKENDS`.
    """
    return _holding(_asked, _known(name))


def asked_for(backend: str) -> str:
    """What a caller's `backend=` comes to: "auto" defers to `use_backend`."""
    return _asked.get() if backend == "auto" else _known(backend)


def choose(op: str, asked: str, available: dict[str, str | None]) -> str:
    """Name the backend that will run `op`.

    Args:
        op: the op's name, for the message.
        asked: the caller's `backend=` argument; "auto" defers to `use_backend`, then to the first that can.
        available: backend name -> None if it can run this call, else the reason it cannot; best first.

    Raises:
        Unsupported: a backend was named and cannot run this call.
    """
    found = _found(op, asked, available)
    if (watched := _watched.get()) is not None:
        watched.setdefault(op, set()).add(found)
    return found


def _found(op: str, asked: str, available: dict[str, str | None]) -> str:
    name = asked_for(asked)
    can = [candidate for candidate, reason in available.items() if reason is None]
    if name == "auto":
        if not can:
            reasons = "; ".join(f"{candidate}: {reason}" for candidate, reason in available.items())
            raise Unsupported(f"no backend can run {op!r}: {reasons}.")
        return can[0]
    if name not in can:
        reason = available.get(name) or "it is not implemented for this op"
        raise Unsupported(f"{op!r} was asked to run on {name!r}: {reason}. Available: {', '.join(can) or 'none'}.")
    return name


def no_triton(place: device) -> str | None:
    """Why Triton kernels cannot run on a device; None if they can, on a CPU through the interpreter (for tests)."""
    if not has_triton():
        return "triton is not installed"
    if place.type == "cuda" or (place.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    return f"Triton's kernels are for a GPU, and the tensors are on {place} (TRITON_INTERPRET=1 runs them on a CPU)"


@functools.cache
def has_triton() -> bool:
    """Is it installed? Asked in every layer, so looked up once."""
    return importlib.util.find_spec("triton") is not None


def _known(name: str) -> str:
    """`name`, if it is a backend's; the old name `cpu` is `torch` for one release more."""
    if name == "cpu":
        _say_cpu_is_torch()
        return "torch"
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is unknown. Choose one of {', '.join(BACKENDS)}.")
    return name


@functools.cache
def _say_cpu_is_torch() -> None:
    """Once a process: ops call `choose` thousands of times a step."""
    message = "backend 'cpu' runs on other devices too and is now called 'torch'; the next release drops the old name."
    warnings.warn(message, DeprecationWarning, stacklevel=5)
