"""Sides that train in turns, one step each, the order flipped each round: exactly one of them computes at any time.

A side waits at the start of every step for its turn; whatever comes before the next step (data, saving, evaluation)
belongs to the turn.
"""

from __future__ import annotations

import contextlib
import math
import selectors
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sparsetrain.runs.events import Event, Report
from sparsetrain.runs.sides import Side

TURN, ASKS = "turn", "asks"
"""Events of a side that waits: for its turn, or to be told the dense model's quality."""
GO, MEASURE = "go", "measure"
"""What a side is told: to train a step, or to train one and evaluate the model after it."""
NEAR, AHEAD = 0.04, 0.8
"""An evaluation is near enough to a time that is this share later; within a twentieth it is taken for it. The first is
made at AHEAD of the time that is expected: on a machine that gets idle the end comes earlier, between the two."""


def train_in_turns(work: str, jobs: dict[str, dict[str, Any]], report: Report) -> None:
    """Train one side for each job, until all are done.

    The side that takes longer is evaluated shortly before the other will have spent all its time and when it has, so
    that the two are known at equal time, set-up included.

    Args:
        work: `module:function` that trains a side, as `runs.sides.Side` takes it. It tells `TURN` at the start of each
            step and `ASKS` where it needs the dense model's quality, and waits.
        jobs: side -> what its work is given. The first side sets up first, and waits for its first turn; it trains
            after the others in the first round.
        report: told the events of all sides; each event has a `side`.

    Raises:
        as `runs.sides.Side.read`: when one side fails, the others are stopped.
    """
    with _waiting_sides(work, jobs, report) as sides:
        order = sides[::-1]
        while running := [each for each in order if not each.side.done]:
            for each in running:
                _turn(sides, each)
            order.reverse()


def time_in_turns(
    work: str, jobs: dict[str, dict[str, Any]], report: Report, wanted: Callable[[dict[str, list[float]]], set[str]]
) -> dict[str, dict[str, Any]]:
    """Time steps of sides whose training nobody keeps: side -> {seconds: of its steps, peaks: after each of them}.

    Args:
        wanted: (side -> seconds of its steps) -> the sides to go on with, asked after each round; the others wait, and
            all are stopped when none is wanted. Each side's first step, which allocates, is left out.
    """
    with _waiting_sides(work, jobs, report) as sides:
        order = sides[::-1]
        for each in sides:
            each.measured_s = math.inf  # nothing of these is evaluated
        while True:
            seconds = {each.side.name: each.seconds[1:] for each in sides}
            going = wanted(seconds)
            running = [each for each in order if each.side.name in going and not each.side.done]
            if not running:
                return {each.side.name: {"seconds": each.seconds[1:], "peaks": each.peaks[2:]} for each in sides}
            for each in running:
                _turn(sides, each)
            order.reverse()


@contextlib.contextmanager
def _waiting_sides(work: str, jobs: dict[str, dict[str, Any]], report: Report) -> Iterator[list[_Trained]]:
    with contextlib.ExitStack() as stack:
        sides = []
        for name in jobs:
            side = Side(work, name)
            sides.append(_Trained(stack.enter_context(side), report))
        for each in sides:  # the sparse one first: it checks its recipe, and then asks how good the dense model is
            each.side.send(jobs[each.side.name])
            _until_waiting(sides, each)
        yield sides


@dataclass
class _Trained:
    """A side that is trained. waiting: for its turn. asks: for the dense model's quality, and not for a turn.

    wall_s: its set-up and its steps so far, `step` of `steps`; seconds: of the steps of this process.
    measured_s: what it had spent when it was evaluated for the comparison at equal time, set-up included.
    peaks: what the process has held at most, as it says when it asks for a turn.
    """

    side: Side
    report: Report
    waiting: bool = False
    asks: bool = False
    dense_quality: dict[str, Any] | None = None
    setup_s: float = 0.0
    wall_s: float = 0.0
    step: int = 0
    steps: int = 0
    measured_s: float | None = None
    seconds: list[float] = field(default_factory=list)
    peaks: list[dict[str, Any]] = field(default_factory=list)

    def take(self, event: Event) -> None:
        kind = event["event"]
        if kind in (TURN, ASKS):
            self.waiting, self.asks = True, kind == ASKS
            self.peaks += [event["peaks"]] if kind == TURN else []
            return
        if kind == "quality" and event["stage"] in ("dense", "untrained"):
            self.dense_quality = event["quality"]
        elif kind == "setup":
            self.setup_s = event["seconds"]
        elif kind == "step":
            self.seconds.append(event["step_time_s"])
            self.wall_s, self.step, self.steps = event["wall_s"], event["step"], event["steps"]
        self.report({"side": self.side.name, **event})

    def spent_after(self, steps: int) -> float:
        """Seconds, set-up included, when so many steps will be done, at the pace of all steps or of the last eight, if
        they are faster: a machine gets idle. The first step is slow."""
        steady = self.seconds[1:]
        pace = min(statistics.median(steady), statistics.median(steady[-8:]))
        return self.setup_s + self.wall_s + (steps - self.step) * pace

    def reaches(self, other: _Trained) -> bool:
        """After the next step this side, the slower one, has spent nearly what the other will in all, or all of it.

        Once more where that turns out to be later than was thought: the pace of a busy machine changes.
        """
        known = len(self.seconds) > 1 and len(other.seconds) > 1
        if not known or self.step + 1 >= self.steps:
            return False
        end = other.spent_after(other.steps)
        if self.measured_s is not None and end <= (1 + NEAR) * self.measured_s:
            return False
        due = end if self.measured_s is not None else AHEAD * end
        return self.spent_after(self.step + 1) >= due and self.spent_after(self.steps) > (1 + NEAR) * end


def _turn(sides: list[_Trained], active: _Trained) -> None:
    """One step of a side; its first turn also tells it the dense quality that another side has measured."""
    others = [other for other in sides if other is not active]
    if active.asks:
        active.asks = False
        active.side.send(next((other.dense_quality for other in others), None))
        _until_waiting(sides, active)
    reaches = len(others) == 1 and active.reaches(others[0])
    if reaches:
        active.measured_s = active.spent_after(active.step + 1)
    active.side.send(MEASURE if reaches else GO)
    _until_waiting(sides, active)


def _until_waiting(sides: list[_Trained], active: _Trained) -> None:
    """Pass events on until the active side waits for its next turn or is done; any side's death is an error."""
    active.waiting = False
    with selectors.DefaultSelector() as selector:
        for each in sides:
            if not each.side.done:
                selector.register(each.side, selectors.EVENT_READ, each)
        while not (active.waiting or active.side.done):
            for key, _ in selector.select():
                each = key.data
                each.side.read(each.take)
                if each.side.done:
                    selector.unregister(key.fileobj)
