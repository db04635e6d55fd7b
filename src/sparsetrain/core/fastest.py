"""Which of several ways is fastest here: timed in turns where they run, remembered until the machine starts again."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from sparsetrain.core.remembered import cache_folder, name_here, recall, remember

Ways = dict[str, Callable[[], object]]
"""Name -> what is timed, as long as it takes on the device."""

ROUNDS, SECONDS = 40, 0.2
"""Rounds are taken up to `ROUNDS`, or to where the first way has run for `SECONDS`; 3 at least, after two that warm
up."""
_NO_MEMORY = torch.OutOfMemoryError.__name__
_known: dict[str, Timings] = {}


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Medians in ms of every way that ran, and why the others did not.

    key: all that the figures depend on, besides the machine.
    """

    op: str
    key: str
    ms: dict[str, float]
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def order(self) -> list[str]:
        return sorted(self.ms, key=self.ms.__getitem__)

    @property
    def lacked_memory(self) -> bool:
        """Whether it was the moment that failed, and not a way: true of this process alone."""
        nothing = not self.ms and not self.failed
        return nothing or any(why.startswith(_NO_MEMORY) for why in self.failed.values())

    def __str__(self) -> str:
        parts = [f"{name} {self.ms[name]:.3g} ms" for name in self.order]
        return f"{self.key}: " + ", ".join(parts + [f"{name} failed ({why})" for name, why in self.failed.items()])


def timings_here(op: str, key: str, device: torch.device, ways: Callable[[], Ways]) -> Timings:
    """As this process knows it, or the cache folder does, or timed now.

    Timed in a thread of its own: the caller may be in a forward that saves nothing, or recomputes, or casts, and none
    of that reaches another thread.
    """
    path = _folder() / name_here("fastest", op, key, _name(device))
    if path.name not in _known:
        text = recall(path)
        if text is not None:
            _known[path.name] = Timings(**json.loads(text))
        else:
            with ThreadPoolExecutor(1) as other:
                _known[path.name] = other.submit(_timed, op, key, device, ways).result()
            if not _known[path.name].lacked_memory:
                remember(path, json.dumps(asdict(_known[path.name])))
    return _known[path.name]


def may_time(x: torch.Tensor) -> bool:
    """Whether a call on `x` is of a kind that is timed: on a GPU, neither compiled nor being recorded.

    Whether gradients are wanted must not count: a checkpointed forward and its recomputation decide alike.
    """
    return x.is_cuda and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()


def ranked(found: dict[str, str | None], known: Timings) -> dict[str, str | None]:
    """Backends as `choose` takes them: the fastest first, then those that were not timed, and none that broke."""
    broken = {name: f"it failed when it was timed: {why}" for name, why in known.failed.items() if name in found}
    return {name: found[name] for name in known.order if name in found} | found | broken


def all_timings(device: torch.device) -> list[Timings]:
    """What is remembered of this device since the machine started."""
    found = []
    for path in sorted(_folder().glob("fastest-*.json")) if _folder().is_dir() else []:
        text = recall(path)
        timings = None if text is None else Timings(**json.loads(text))
        if timings is not None and path.name == name_here("fastest", timings.op, timings.key, _name(device)):
            found.append(timings)
    return sorted(found, key=lambda timings: (timings.op, timings.key))


def in_turns(
    ways: Ways, device: torch.device, rounds: int = ROUNDS, seconds: float = SECONDS
) -> dict[str, list[float]]:
    """ms of every way in every round, the order flipped each round, two rounds of warming up left out.

    On a CPU it is the CPU's time of this process: others may work too.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    first = next(iter(ways))
    for index in range(2 + rounds):
        for name in list(ways)[:: 1 if index % 2 else -1]:
            times[name].append(_ms(ways[name], device))
        if index > 3 and sum(times[first][2:]) > seconds * 1e3:
            break
    return {name: found[2:] for name, found in times.items()}


def _timed(op: str, key: str, device: torch.device, made: Callable[[], Ways]) -> Timings:
    failed: dict[str, str] = {}
    try:
        ways = made()
    except torch.OutOfMemoryError:  # the caller's own call may still fit
        return Timings(op=op, key=key, ms={})
    for name in list(ways):
        try:
            ways[name]()
        except Exception as error:  # a compiler's own errors and lack of shared memory have no common class
            failed[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
            del ways[name]
    found = in_turns(ways, device) if ways else {}
    return Timings(op=op, key=key, ms={name: statistics.median(ms) for name, ms in found.items()}, failed=failed)


def _ms(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.process_time()
        run()
        return (time.process_time() - start) * 1e3
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _folder() -> Path:
    return cache_folder() / "machine"
