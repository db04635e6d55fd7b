"""The protocol of sides: jobs, events and questions, errors that come back, and deaths that are told."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import pytest

from sparsetrain.core.errors import PlanError, UnknownFamily
from sparsetrain.runs.sides import Line, Side, SideDied

ERRORS = {
    "plan": PlanError("both claim one site"),
    "family": UnknownFamily("no such family"),
    "memory": RuntimeError("CUDA out of memory. Tried to allocate"),
    "other": KeyError("x"),
    "file": FileNotFoundError(2, "No such file", "absent.txt"),
}


def asks(job: dict[str, Any], line: Line) -> Any:
    line.tell({"event": "asks", "path": job["path"]})
    return {"heard": line.wait(), "layers": {1: 2.5}}


def fails(job: str, _line: Line) -> None:
    raise ERRORS[job]


def dies(job: str, _line: Line) -> None:
    print("last words", file=sys.stderr, flush=True)
    if job == "exit":
        os._exit(3)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_job_an_event_a_question_and_an_answer() -> None:
    heard: list[dict[str, Any]] = []
    with Side(f"{__name__}:asks") as side:
        side.send({"path": "a"})
        while not heard:
            side.read(heard.append)
        side.send("go")
        while not side.done:
            side.read(heard.append)
    assert heard == [{"event": "asks", "path": "a"}]
    assert side.answer == {"heard": "go", "layers": {"1": 2.5}}


@pytest.mark.parametrize(
    ("kind", "raised", "message"),
    [
        ("plan", PlanError, "^sparse side: both claim"),
        ("family", UnknownFamily, "no such family"),
        ("memory", MemoryError, "out of memory"),
        ("other", RuntimeError, "KeyError: 'x'"),
        ("file", FileNotFoundError, r"absent\.txt"),
    ],
)
def test_an_error_is_raised_again_with_its_traceback(kind: str, raised: type[Exception], message: str) -> None:
    with Side(f"{__name__}:fails", "sparse") as side, pytest.raises(raised, match=message) as caught:
        side.result(kind)
    assert type(caught.value) is raised and "Traceback" in caught.value.__notes__[0]


def test_one_alone_has_no_name_in_its_error() -> None:
    with Side(f"{__name__}:fails") as side, pytest.raises(UnknownFamily, match=r"^no such family"):
        side.result("family")


@pytest.mark.parametrize(("how", "code", "message"), [("exit", 3, "exit code 3"), ("kill", -9, "killed by signal 9")])
def test_a_death_is_told_with_the_last_words(how: str, code: int, message: str) -> None:
    with (
        Side(f"{__name__}:dies", "dense") as side,
        pytest.raises(SideDied, match=rf"the dense side .*{message}") as died,
    ):
        side.result(how)
    assert died.value.code == code and "last words" in str(died.value)


def test_leaving_stops_a_side_that_waits() -> None:
    heard: list[dict[str, Any]] = []
    with Side(f"{__name__}:asks") as side:
        side.send({"path": "a"})
        while not heard:
            side.read(heard.append)
    assert side._process.poll() is not None
