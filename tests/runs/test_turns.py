"""When the slower side is evaluated: shortly before it has spent what the other will in all, and when it has."""

from __future__ import annotations

from typing import Any

from sparsetrain.runs.events import silent
from sparsetrain.runs.turns import _Trained


def side(step_s: float, setup_s: float = 0.0, steps: int = 10) -> _Trained:
    made = _Trained(side=None, report=silent)  # type: ignore[arg-type]
    made.side = type("Named", (), {"name": "x"})()  # type: ignore[assignment]
    if setup_s:
        made.take({"event": "setup", "seconds": setup_s})
    made.steps, made.pace = steps, step_s  # type: ignore[attr-defined]
    return made


def train(trained: Any, first_s: float | None = None) -> None:
    seconds = first_s if trained.step == 0 and first_s is not None else trained.pace
    wall = trained.wall_s + seconds
    step = {"step": trained.step + 1, "steps": trained.steps, "step_time_s": seconds, "wall_s": wall}
    trained.take({"event": "step", **step})


def measured_after(slow: Any, fast: Any, first_s: float | None = None, idle_after: int | None = None) -> list[float]:
    """Seconds at which the slower side was evaluated, both trained in turns; idle_after: steps; the rest
    takes two thirds of the time."""
    measured = []
    for step in range(slow.steps):
        if step == idle_after:
            slow.pace, fast.pace = slow.pace / 1.5, fast.pace / 1.5
        asked = slow.reaches(fast)
        assert not fast.reaches(slow)
        if asked:
            slow.measured_s = slow.spent_after(slow.step + 1)
        train(slow, first_s)
        measured += [slow.wall_s + slow.setup_s] if asked else []
        train(fast)
    return measured


def test_the_slower_side_is_evaluated_when_the_other_has_spent_its_time() -> None:
    assert measured_after(side(2.0), side(1.0)) == [8.0, 10.0]  # five steps of 2 s, and the one before the last
    assert measured_after(side(2.0), side(1.0, setup_s=3.0)) == [12.0, 14.0]  # 13 s: before it, and in the next step
    assert measured_after(side(1.0, setup_s=4.0), side(1.0)) == [8.0, 10.0]  # it began 4 s later


def test_the_slow_first_step_says_nothing_of_the_pace() -> None:
    assert measured_after(side(2.0), side(1.0), first_s=6.0) == [10.0]  # 6 s, and two steps of 2 s


def test_an_end_that_comes_earlier_than_thought_lies_between_two_evaluations() -> None:
    slow, fast = side(2.0, steps=100), side(1.0, steps=100)
    before, after = measured_after(slow, fast, idle_after=30)
    assert before <= fast.wall_s <= after  # at the pace of the first steps it would have ended after 100 s


def test_it_is_not_evaluated_at_its_end_or_when_both_take_as_long() -> None:
    assert measured_after(side(1.0), side(1.0)) == []
    assert measured_after(side(1.03), side(1.0)) == []  # in the last step, which is evaluated anyway


def test_it_is_evaluated_once_and_again_where_the_other_ends_later_than_thought() -> None:
    slow, fast = side(2.0, steps=20), side(1.0)
    for _ in range(4):
        train(slow)
        train(fast)
    slow.measured_s = 10.0
    train(slow)
    train(fast)
    assert not slow.reaches(fast)  # 12 s, and the other ends after 10 as it was thought to
    fast.pace = 3.0
    for _ in range(5):
        train(fast)  # it ends after 20 s
    assert not slow.reaches(fast)
    for _ in range(4):
        train(slow)
    assert slow.reaches(fast)  # the next step is the tenth
    slow.measured_s = 20.0
    train(slow)
    assert not slow.reaches(fast)
