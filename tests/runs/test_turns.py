"""When the slower side is evaluated: in the step in which it has spent what the other will in all."""

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


def measured_after(slow: Any, fast: Any, first_s: float | None = None) -> int | None:
    """The step after which the slower side is evaluated, both trained in turns."""
    for _ in range(slow.steps):
        asked = slow.reaches(fast)
        assert not fast.reaches(slow)
        train(slow, first_s)
        if asked:
            return slow.step
        train(fast)
    return None


def test_the_slower_side_is_evaluated_when_the_other_has_spent_its_time() -> None:
    assert measured_after(side(2.0), side(1.0)) == 5  # 10 s: five steps of 2 s
    assert measured_after(side(2.0), side(1.0, setup_s=3.0)) == 7  # 13 s: in the seventh step
    assert measured_after(side(1.0, setup_s=4.0), side(1.0)) == 6  # it began 4 s later


def test_the_slow_first_step_says_nothing_of_the_pace() -> None:
    assert measured_after(side(2.0), side(1.0), first_s=6.0) == 3  # 6 s, and two steps of 2 s


def test_it_is_not_evaluated_at_its_end_or_when_both_take_as_long() -> None:
    assert measured_after(side(1.0), side(1.0)) is None
    assert measured_after(side(1.05), side(1.0)) is None  # in the last step, which is evaluated anyway


def test_it_is_evaluated_once_and_again_where_the_other_ends_later_than_thought() -> None:
    slow, fast = side(2.0, steps=20), side(1.0)
    for _ in range(4):
        train(slow)
        train(fast)
    assert slow.reaches(fast)
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
