"""`make bench-gpu`: all that a GPU is asked, in one command and ten minutes, the most telling first.

Every part is a process of its own with a limit of minutes. One that fails, or is stopped at its limit, keeps no later
one from running and makes the end non-zero; what it has measured is on file, and the next run goes on there.
`--quick` tries every part at tiny sizes, on a CPU where there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.runner import ROOT, Say


@dataclass(frozen=True)
class Part:
    """A command, and the minutes after which it is stopped."""

    name: str
    command: tuple[str, ...]
    minutes: float


def parts(output: Path | None, *, quick: bool, has_gpu: bool = True) -> list[Part]:
    """Minutes sum to ten, and no cell begins in a part's last quarter. Tried on a slow machine, each may take ten."""

    def benchmark(name: str, minutes: float) -> Part:
        flags = ("--quick",) if quick else ("--minutes", f"{0.75 * minutes:g}")
        where = () if output is None else ("--output", str(output))
        command = (sys.executable, "-m", "bench", "run", name, *flags, *where)
        return Part(name, command, 10 if quick else minutes)

    without = () if has_gpu else ("--collect-only",)  # they would ask for one and fail
    tests = (sys.executable, "-m", "pytest", "-q", *without, "-m", "gpu", *files_with_gpu_tests())
    return [
        benchmark("gpu_steps", 3.5),
        benchmark("blocks_gpu", 1.25),
        benchmark("gpu_long_rows", 1.5),
        Part("tests", tests, 10 if quick else 1.25),
        benchmark("sparse24_gpu", 1.0),
        benchmark("planner_accuracy_gpu", 1.5),
    ]


def files_with_gpu_tests() -> list[str]:
    """To collect all tests takes longer than these do."""
    files = sorted((ROOT.parent / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT.parent)) for file in files if "pytest.mark.gpu" in file.read_text()]


def run_all(wanted: Sequence[Part], say: Say = print) -> int:
    """Run every part; the number of those that failed or were stopped."""
    failed = []
    for part in wanted:
        say(f"== {part.name}, {part.minutes:g} minutes at most")
        began = time.perf_counter()
        if (ended := run_part(part)) is not None:
            failed.append(f"{part.name}: {ended}")
        say(f"== {part.name} {ended or 'ended well'} ({time.perf_counter() - began:.0f} s)")
    say("every part ended well" if not failed else f"{len(failed)} of {len(wanted)} parts failed: {'; '.join(failed)}")
    return len(failed)


def run_part(part: Part) -> str | None:
    """None, or how it failed. It is stopped with all processes that it began."""
    child = subprocess.Popen(part.command, cwd=ROOT.parent, start_new_session=True)
    try:
        code = child.wait(60 * part.minutes)
        return f"ended with code {code}" if code else None
    except subprocess.TimeoutExpired:
        return f"stopped after {part.minutes:g} minutes"
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def main(arguments: list[str] | None = None, has_gpu: Callable[[], bool] = torch.cuda.is_available) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.parts", description=__doc__)
    parser.add_argument("--output", type=Path, help="folder of the result files; with --quick none are written without")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for a trial of the code; on a CPU too")
    asked = parser.parse_args(arguments)
    if not has_gpu() and not asked.quick:
        print(
            "bench-gpu: PyTorch finds no NVIDIA GPU here, and these sizes are a GPU's. `make bench-gpu QUICK=1` tries "
            "the code on this CPU at tiny ones; `sparsetrain doctor` says what PyTorch sees.",
            file=sys.stderr,
        )
        return 2
    if not has_gpu():
        print("A dry run on a CPU at tiny sizes: no figure of it is a GPU's.", flush=True)
    wanted = parts(asked.output, quick=asked.quick, has_gpu=has_gpu())
    return 1 if run_all(wanted, lambda line: print(line, flush=True)) else 0


if __name__ == "__main__":
    sys.exit(main())
