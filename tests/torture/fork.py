"""Run the command line in forked children, some at a time, and account for each: exit code, output, processor time,
memory."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WALL_SECONDS = 120  # by then a child waits for something that doesn't come


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    code: exit code, minus the signal's number where one ended it. cpu_seconds: its own and its children's.
    rss_bytes: largest resident set. late: it was still there after `WALL_SECONDS` and was killed.
    """

    code: int
    out: str
    err: str
    cpu_seconds: float
    rss_bytes: int
    late: bool


@dataclass(frozen=True)
class Job:
    """One child: its arguments, where it runs, what it does first, and the caller's own mark."""

    arguments: tuple[str, ...]
    folder: Path
    mark: Any
    before: Callable[[], None] | None = None
    kill_after: float | None = None
    """Seconds until it gets SIGKILL."""


def run_all(jobs: Iterable[Job], at_once: int = 2) -> Iterator[tuple[Job, Ended]]:
    """Run each job in a child, `at_once` at a time; yields as they end. A job is taken when there is room for it."""
    waiting = iter(jobs)
    running: dict[int, tuple[Job, float]] = {}
    while True:
        while len(running) < at_once and (job := next(waiting, None)) is not None:
            running[_start(job)] = (job, time.monotonic())
        if not running:
            return
        for pid in list(running):
            job, began = running[pid]
            waited = time.monotonic() - began
            found, status, usage = os.wait4(pid, os.WNOHANG)
            late = False
            if not found and waited > min(WALL_SECONDS, job.kill_after or WALL_SECONDS):
                late = job.kill_after is None
                _kill(pid)
                found, status, usage = os.wait4(pid, 0)
            if found:
                del running[pid]
                _kill(pid)  # what it has left behind in its process group
                yield job, _ended(job, status, usage, late)
        time.sleep(0.005)


def run_one(job: Job) -> Ended:
    return next(run_all([job]))[1]


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _ended(job: Job, status: int, usage: resource.struct_rusage, late: bool) -> Ended:
    def said(name: str) -> str:
        path = job.folder / name
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    seconds = usage.ru_utime + usage.ru_stime
    return Ended(os.waitstatus_to_exitcode(status), said(".out"), said(".err"), seconds, usage.ru_maxrss * 1024, late)


def _start(job: Job) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setsid()
        os.chdir(job.folder)
        # a question that reaches stdin is answered yes: what it lets in leaves its mark
        (job.folder / ".yes").write_text("y\n" * 50)
        for name, flags, number in (
            (".yes", os.O_RDONLY, 0),
            (".out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 1),
            (".err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 2),
        ):
            os.dup2(os.open(job.folder / name, flags, 0o644), number)
        sys.stdin, sys.stdout, sys.stderr = (
            open(0, encoding="utf-8"),  # noqa: SIM115
            open(1, "w", encoding="utf-8", errors="backslashreplace"),  # noqa: SIM115
            open(2, "w", encoding="utf-8", errors="backslashreplace"),  # noqa: SIM115
        )
        os.environ["XDG_CACHE_HOME"] = str(job.folder / ".cache")
        if job.before is not None:
            job.before()
        from sparsetrain.cli import run

        code = run(job.arguments)
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return 0


def import_everything() -> None:
    """What the commands import when they are first used, so that a child finds it done. One thread: a pool of threads
    wouldn't survive the fork."""
    import torch

    torch.set_num_threads(1)
    import importlib
    import pkgutil

    import peft  # noqa: F401
    import transformers  # noqa: F401
    from transformers import Trainer  # noqa: F401

    import sparsetrain

    for module in pkgutil.walk_packages(sparsetrain.__path__, "sparsetrain."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
