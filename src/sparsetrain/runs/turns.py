"""Sides that train in turns, one step each, the order flipped each round: exactly one of them computes at any time.

A side waits at the start of every step for its turn; whatever comes before the next step (data, saving, evaluation)
belongs to the turn.
"""

from __future__ import annotations

import contextlib
import selectors
from dataclasses import dataclass
from typing import Any

from sparsetrain.runs.events import Event, Report
from sparsetrain.runs.sides import Side

TURN, ASKS = "turn", "asks"
"""Events of a side that waits: for its turn, or to be told the dense model's quality."""


def train_in_turns(work: str, jobs: dict[str, dict[str, Any]], report: Report) -> None:
    """Train one side for each job, until all are done.

    Args:
        work: `module:function` that trains a side, as `runs.sides.Side` takes it. It tells `TURN` at the start of each
            step and `ASKS` where it needs the dense model's quality, and waits.
        jobs: side -> what its work is given. The first side sets up first, and waits for its first turn; it trains
            after the others in the first round.
        report: told the events of all sides; each event has a `side`.

    Raises:
        as `runs.sides.Side.read`: when one side fails, the others are stopped.
    """
    with contextlib.ExitStack() as stack:
        sides = []
        for name in jobs:
            side = Side(work, name)
            sides.append(_Trained(stack.enter_context(side), report))
        for each in sides:  # the sparse one first: it checks its recipe, and then asks how good the dense model is
            each.side.send(jobs[each.side.name])
            _until_waiting(sides, each)
        order = sides[::-1]
        while running := [each for each in order if not each.side.done]:
            for each in running:
                _turn(sides, each)
            order.reverse()


@dataclass
class _Trained:
    """A side that is trained. waiting: for its turn. asks: for the dense model's quality, and not for a turn."""

    side: Side
    report: Report
    waiting: bool = False
    asks: bool = False
    dense_quality: dict[str, Any] | None = None

    def take(self, event: Event) -> None:
        if event["event"] in (TURN, ASKS):
            self.waiting, self.asks = True, event["event"] == ASKS
            return
        if event["event"] == "quality" and event["stage"] in ("dense", "untrained"):
            self.dense_quality = event["quality"]
        self.report({"side": self.side.name, **event})


def _turn(sides: list[_Trained], active: _Trained) -> None:
    """One step of a side; its first turn also tells it the dense quality that another side has measured."""
    if active.asks:
        active.asks = False
        active.side.send(next((other.dense_quality for other in sides if other is not active), None))
        _until_waiting(sides, active)
    active.side.send("go")
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
