"""Sides: processes of their own that each do one job, for runs that are trained in turns or measured alone.

A side gets its job as a line of JSON on its stdin, and further lines as it asks for them. It answers with events, lines
of JSON on a pipe; the last one is `done`, with the answer, or `failed`, with the error, which is raised again here.
What it prints goes to a file, whose end is quoted if it dies without a word. When this process is gone, a side ends
within a moment.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any, Self

from sparsetrain.core.errors import CheckpointError, InUse, NotFinite, PlanError, UnknownFamily
from sparsetrain.core.files import to_json
from sparsetrain.runs.events import Event, Report, silent

_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (ValueError, PlanError, CheckpointError, UnknownFamily, InUse, RuntimeError, NotFinite, MemoryError)
}
"""The exceptions that are raised again as what they were; others become a RuntimeError that names them."""


ORPHANED_S = 5.0
"""A side whose parent was killed is gone after this many seconds at the latest."""


class SideDied(RuntimeError):
    """A side ended before it was done; `code` is its exit code, or minus the signal that killed it."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Side:
    """One side's process, from `__enter__` to `__exit__`, which stops it.

    Args:
        work: "module:function", called over there as function(job, line); what it returns is the answer.
        name: which side it is, in its errors; empty for one alone.

    `done` is set when it has answered, and then `answer`.
    """

    def __init__(self, work: str, name: str = "") -> None:
        self.work, self.name = work, name
        self.done = False
        self.answer: Any = None
        self._buffer = b""

    def __enter__(self) -> Self:
        self._events, writer = os.pipe()
        self._printed = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from sparsetrain.runs.sides import serve; serve()",
                self.work,
                str(writer),
                str(os.getpid()),
            ],
            stdin=subprocess.PIPE,
            stdout=self._printed,
            stderr=self._printed,
            pass_fds=(writer,),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C reaches us alone; we stop all sides
        )
        os.close(writer)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._events)
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        if not self.done:
            self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._printed.close()

    def fileno(self) -> int:
        """Of the pipe of events, for a selector."""
        return self._events

    def send(self, value: Any) -> None:
        """Give it the job, or what it waits for.

        Raises:
            SideDied: it is gone.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(to_json(value).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def read(self, take: Report) -> None:
        """Wait for events, and give them to `take`.

        Raises:
            whatever the side raised; MemoryError if it ran out of memory; SideDied if it died without a word.
        """
        data = os.read(self._events, 65536)
        if not data:
            raise self._death()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            event = json.loads(line)
            if event["event"] == "done":
                self.done, self.answer = True, event["answer"]
            elif event["event"] == "failed":
                raise _raised_again(event, self.name)
            else:
                take(event)

    def result(self, job: Any, take: Report = silent) -> Any:
        """Give it its job and wait for the answer; errors as of `read`."""
        self.send(job)
        while not self.done:
            self.read(take)
        return self.answer

    def _death(self) -> SideDied:
        code = self._process.wait()
        self._printed.seek(0)
        words = self._printed.read().decode(errors="replace").strip().splitlines()[-5:]
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        what = f"the {self.name} side" if self.name else "the process"
        return SideDied(f"{what} {how} before it was done. {' | '.join(words)}".strip(), code)


def _raised_again(event: Event, side: str) -> Exception:
    """The side's exception; its traceback is attached as a note."""
    if event["errno"] is not None:
        error: Exception = OSError(event["errno"], os.strerror(event["errno"]), event["filename"])
    else:
        message = f"{side} side: {event['message']}" if side else event["message"]
        error = _ERRORS.get(event["kind"], RuntimeError)(message)
    error.add_note(event["traceback"])
    return error


# ---- the side's own process ----


class Line:
    """What a side has of the process that started it: it tells events, and waits for what comes next."""

    def __init__(self, tell: Callable[[Event], None]) -> None:
        self.tell = tell

    def wait(self) -> Any:
        """The next value that is sent; the end of stdin means that the parent is gone, and so are we."""
        if not (line := sys.stdin.readline()):
            raise SystemExit(1)
        return json.loads(line)


def serve() -> None:
    """Entry of a side's process: the work, the number of the event pipe and the parent's in argv."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leaving its folder in order
    threading.Thread(target=_end_with, args=(int(sys.argv[3]),), daemon=True).start()
    with os.fdopen(int(sys.argv[2]), "w", encoding="utf-8") as pipe:

        def tell(event: Event) -> None:
            pipe.write(to_json(event, default=str) + "\n")
            pipe.flush()

        line = Line(tell)
        try:
            module, _, name = sys.argv[1].partition(":")
            answer = getattr(import_module(module), name)(line.wait(), line)
        except Exception as error:
            tell(_failed(error))
        else:
            tell({"event": "done", "answer": answer})


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone, at whatever moment: another may go on in its folder."""
    while os.getppid() == parent:
        time.sleep(ORPHANED_S / 20)
    os._exit(1)


def _failed(error: Exception) -> Event:
    kind = next((k.__name__ for k in type(error).__mro__ if k.__name__ in _ERRORS), "")
    if "out of memory" in str(error).lower():
        kind = "MemoryError"
    return {
        "event": "failed",
        "kind": kind,
        "message": str(error) if kind else f"{type(error).__name__}: {error}",
        "errno": getattr(error, "errno", None),
        "filename": getattr(error, "filename", None),
        "traceback": traceback.format_exc(),
    }
