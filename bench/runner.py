"""One runner for every benchmark: a declaration in the module that measures, cells that are resumed, one result file.

A benchmark is a `Benchmark` at the top of a module under `bench/`; it is found there, no list has to be edited. Its
cells are measured one by one and saved at once, so a run that is stopped goes on where it was. `--again` measures
cells that the file holds already, and `--minutes` begins no further cell after so long.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import pkgutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import Any

import bench

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
Say = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a benchmark is asked for.

    settings: the declared ones, changed by `--quick` and `--set`.
    seeds: of benchmarks that train.
    threads: torch's, also of processes that a cell starts.
    only: part of a cell's key, or a pattern (`*`, `?`) of all of it; a benchmark may read it to prepare no more than
        is needed.
    """

    settings: dict[str, Any]
    seeds: tuple[int, ...] = (0,)
    threads: int = 1
    device: str = "cpu"
    only: str = ""

    def asks_for(self, key: str) -> bool:
        return fnmatchcase(key, self.only if set("*?") & set(self.only) else f"*{escape(self.only)}*")


@dataclass(frozen=True)
class Cell:
    """One measurement.

    key: in the file. measure: makes it, from what the cells that it `uses` have found. path: its place if that is not
    the key. uses: keys of cells before it. leaves: keys of its result that name files or folders which those that use
    it read: where one is missing (another checkout), the cell is measured again before them.
    """

    key: str
    measure: Callable[..., Any]
    path: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()

    def missing(self, found: dict[str, Any]) -> list[str]:
        """What it had left, and is not here."""
        return [found[name] for name in self.leaves if name in found and not Path(found[name]).exists()]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A declaration.

    Attributes:
        name: also of its result file.
        measures: what, in one line.
        cells: all cells for what was asked.
        settings: what `--set` may change. Stored; a file made with other settings is refused.
        quick: the settings that `--quick` changes, for a trial of the code.
        under: the file's entry that holds the cells.
        key_of: where that entry is a list of rows, the key of a row.
        whole: one cell fills that entry.
        shows: the numbers of a cell that a progress line shows.
        about: further entries of the file, asked once a cell is measured.
        needs_gpu: left out of `run all`.
    """

    name: str
    measures: str
    cells: Callable[[Asked], list[Cell]]
    settings: dict[str, Any] = field(default_factory=dict)
    quick: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    threads: int | None = None
    dtype: str = "float32"
    under: str = "results"
    key_of: Callable[[dict[str, Any]], str] | None = None
    whole: bool = False
    shows: tuple[str, ...] = ()
    about: Callable[[Asked], dict[str, Any]] = lambda asked: {}
    environment: dict[str, str] = field(default_factory=dict)
    needs_gpu: bool = False


class ResultFile:
    """What a benchmark has measured. Every number has machine, versions, commit and dtype, also after a resume."""

    def __init__(self, benchmark: Benchmark, cells: list[Cell], folder: Path | None, settings: dict[str, Any]) -> None:
        self.benchmark, self.cells = benchmark, cells
        self.path = None if folder is None else folder / f"{benchmark.name}.json"
        self.data: dict[str, Any] = {}
        self._begun = False
        if self.path is not None and self.path.exists():
            self.data = json.loads(self.path.read_text())
        found = self.data.get("settings", settings)
        if json.loads(json.dumps(settings)) != found:
            raise SystemExit(
                f"{self.path} holds cells measured with {found}, and {settings} was asked for. "
                "Choose another folder with --output."
            )
        self.data["settings"] = settings
        self.data.setdefault(benchmark.under, {} if benchmark.key_of is None else [])

    def found(self, cell: Cell) -> Any:
        """What was measured for a cell; None if nothing was."""
        place = self.data[self.benchmark.under]
        if self.benchmark.whole:
            return place
        if (key_of := self.benchmark.key_of) is not None:
            return next((row for row in place if key_of(row) == cell.key), None)
        for name in cell.path or (cell.key,):
            place = (place or {}).get(name)
        return place

    def holds(self, cell: Cell) -> bool:
        return bool(self.found(cell))

    def put(self, cell: Cell, found: Any, about: dict[str, Any]) -> None:
        """Store a cell, and write the file."""
        self._note_origin(cell, about)
        place = self.data[self.benchmark.under]
        if self.benchmark.whole:
            self.data[self.benchmark.under] = found
        elif (key_of := self.benchmark.key_of) is not None:
            at = next((i for i, row in enumerate(place) if key_of(row) == cell.key), len(place))
            place[at : at + 1] = [found]
        else:
            *parents, last = cell.path or (cell.key,)
            for name in parents:
                place = place.setdefault(name, {})
            place[last] = found
        self._write()

    def _note_origin(self, cell: Cell, about: dict[str, Any]) -> None:
        """`machine` describes this run; cells that another run measured are named in `earlier`, with its machine."""
        from sparsetrain.measure.machine import describe_machine

        now, before = json.loads(json.dumps(describe_machine().to_dict())), self.data.get("machine")
        earlier = self.data.pop("earlier", [])
        if not self._begun and _origin(before) != _origin(now):
            known = {key for entry in earlier for key in entry["cells"]}
            earlier.append({"machine": before, "cells": [key for key in self._held() if key not in known]})
        self._begun = True
        for entry in earlier:
            entry["cells"] = [key for key in entry["cells"] if key != cell.key]
        if earlier := [entry for entry in earlier if entry["cells"]]:
            self.data["earlier"] = earlier
        self.data |= {"name": self.benchmark.name, "machine": now, "dtype": self.benchmark.dtype} | about

    def _held(self) -> list[str]:
        """Keys of all that is stored, cells that are no longer declared included."""
        place, key_of = self.data[self.benchmark.under], self.benchmark.key_of
        if self.benchmark.whole:
            return [cell.key for cell in self.cells if place]
        if key_of is not None:
            return [key_of(row) for row in place]
        return [cell.key for cell in self.cells if cell.path and self.holds(cell)] or list(place)

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n")
        part.replace(self.path)


def _origin(machine: dict[str, Any] | None) -> Any:
    """What makes two runs comparable; the load of the moment is not in it."""
    return machine and [machine.get(name) for name in ("cpu", "cores", "threads", "gpus", "versions", "commit")]


def run(
    benchmark: Benchmark,
    asked: Asked,
    *,
    output: Path | None = RESULTS,
    again: bool = False,
    minutes: float = math.inf,
    say: Say = print,
) -> dict[str, Any]:
    """Measure the cells that are not there yet, saving each; returns what the file holds.

    Args:
        output: folder of the result file; None stores nothing.
        again: measure what is asked for and there, too.
        minutes: begin no cell after so long.
    """
    import torch

    os.environ.update({name: os.environ.get(name, value) for name, value in benchmark.environment.items()})
    torch.set_num_threads(asked.threads)
    cells = cells_of(benchmark, asked)
    file, started = ResultFile(benchmark, cells, output, asked.settings), time.perf_counter()
    known = {cell.key: cell for cell in cells}
    for number, cell in enumerate(cells, 1):
        start = f"[{number}/{len(cells)}] {benchmark.name}: {cell.key}"
        if file.holds(cell) and not (again and asked.asks_for(cell.key)):
            say(f"{start}  is there")
            continue
        began = time.perf_counter()
        if began - started > 60 * minutes:
            say(f"{start}  is left for the next run: {minutes:g} minutes are over")
            break
        found = _measure(cell, file, known, benchmark.about(asked), say)
        say(f"{start}  {_shown(found, benchmark.shows)} ({time.perf_counter() - began:.1f} s)")
    return file.data


def _measure(cell: Cell, file: ResultFile, known: dict[str, Cell], about: dict[str, Any], say: Say) -> Any:
    """Measure a cell and store it; before it, again, those that it uses whose files are not here."""
    for key in cell.uses:
        if missing := known[key].missing(file.found(known[key])):
            say(f"  {missing[0]}, which {cell.key} reads, is not here: {key} is measured again")
            _measure(known[key], file, known, about, say)
    found = cell.measure(*(file.found(known[key]) for key in cell.uses))
    file.put(cell, found, about)
    return found


def cells_of(benchmark: Benchmark, asked: Asked) -> list[Cell]:
    """The cells that are asked for, and those that they use, in the benchmark's order."""
    cells = benchmark.cells(asked)
    wanted: set[str] = set()
    for cell in reversed(cells):  # what is used stands before
        if asked.asks_for(cell.key) or cell.key in wanted:
            wanted |= {cell.key, *cell.uses}
    return [cell for cell in cells if cell.key in wanted]


def _shown(found: Any, names: tuple[str, ...]) -> str:
    values = {name: found[name] for name in names if name in found} if isinstance(found, dict) else {}
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{value}" for name, value in values.items()
    )


def asked_of(
    benchmark: Benchmark,
    *,
    quick: bool = False,
    changes: dict[str, Any] | None = None,
    seeds: tuple[int, ...] = (),
    threads: int | None = None,
    device: str = "cpu",
    only: str = "",
) -> Asked:
    """The benchmark's own settings with what the command line changes."""
    import torch

    changes = changes or {}
    if unknown := [name for name in changes if name not in benchmark.settings]:
        raise SystemExit(
            f"{benchmark.name} has no setting {', '.join(unknown)}. It has: {', '.join(benchmark.settings) or 'none'}."
        )
    return Asked(
        settings=benchmark.settings | (benchmark.quick if quick else {}) | changes,
        seeds=seeds or benchmark.seeds,
        threads=threads or benchmark.threads or torch.get_num_threads(),
        device=device,
        only=only,
    )


def benchmarks() -> dict[str, Benchmark]:
    """All declarations of the modules under `bench/`, by name."""
    found: dict[str, Benchmark] = {}
    for module in pkgutil.walk_packages(bench.__path__, "bench."):
        if module.ispkg or module.name.split(".")[1] not in FOLDERS:
            continue
        for value in vars(importlib.import_module(module.name)).get("BENCHMARKS", ()):
            found[value.name] = value
    return found


FOLDERS = ("gpu", "ops", "methods", "planner")


def in_own_process(function: str, *arguments: Any, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """What `module:function(*arguments)` returns in a fresh process: peaks of memory are that process's alone."""
    command = [sys.executable, "-m", "bench", "call", function, json.dumps(arguments)]
    paths = os.pathsep.join(path for path in sys.path if path)
    settled = os.environ | {"PYTHONPATH": paths} | (environment or {})
    done = subprocess.run(command, env=settled, cwd=ROOT.parent, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{function}{arguments}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
