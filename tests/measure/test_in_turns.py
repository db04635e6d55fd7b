"""Functions timed in turns, and the interval of their ratio."""

from __future__ import annotations

import pytest

from sparsetrain.measure.in_turns import interval, time_in_turns


def test_the_order_is_turned_each_round_until_it_is_enough() -> None:
    called: list[str] = []
    functions = {name: lambda name=name: called.append(name) for name in "abc"}
    times = time_in_turns(functions, lambda times: len(times["a"]) < 3)
    assert called == [*"abc", *"cba", *"abc"]
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(second >= 0 for seconds in times.values() for second in seconds)


def test_an_interval_says_how_little_is_known() -> None:
    assert interval([2.0], [1.0]) == pytest.approx((1.8, 2.0, 2.2))
    assert interval([2.0, 3.0], [1.0, 1.0]) == (2.0, 2.5, 3.0)
    assert interval([2.0, 3.0, 4.0, 9.0, 1.0], [1.0] * 5) == (2.0, 3.0, 4.0)
