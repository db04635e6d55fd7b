"""Timing several ways once, and what is remembered of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparsetrain.core import fastest
from sparsetrain.core.fastest import all_timings, in_turns, timings_here

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(fastest, "_known", {})


def busy(size: int) -> Callable[[], object]:
    x = torch.randn(size, size)
    return lambda: x @ x


def test_the_order_is_that_of_time_and_a_way_that_breaks_is_left_out_with_its_reason() -> None:
    def broken() -> object:
        raise RuntimeError("out of shared memory\nand more")

    found = timings_here("op", "shape", CPU, lambda: {"slow": busy(400), "fast": busy(20), "broken": broken})
    assert found.order == ["fast", "slow"]
    assert found.failed == {"broken": "RuntimeError: out of shared memory"}
    assert str(found).startswith("shape: fast ") and "broken failed (RuntimeError: out of shared memory)" in str(found)


def test_a_shape_is_timed_once_and_known_to_the_next_process(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def ways() -> fastest.Ways:
        made.append(1)
        return {"one": busy(20), "two": busy(40)}

    first = timings_here("op", "shape", CPU, ways)
    assert timings_here("op", "shape", CPU, ways) is first and len(made) == 1
    monkeypatch.setattr(fastest, "_known", {})  # as another process begins
    assert timings_here("op", "shape", CPU, ways) == first and len(made) == 1
    timings_here("op", "another", CPU, ways)
    assert len(made) == 2 and [known.key for known in all_timings(CPU)] == ["another", "shape"]


def test_a_lack_of_memory_is_true_of_this_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks() -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    found = timings_here("op", "shape", CPU, lambda: {"large": lacks, "small": busy(20)})
    assert found.order == ["small"] and "large" in found.failed and all_timings(CPU) == []
    monkeypatch.setattr(fastest, "_known", {})  # as another process begins
    assert timings_here("op", "shape", CPU, lambda: {"large": busy(40), "small": busy(20)}).failed == {}


def test_where_memory_does_not_even_hold_what_would_be_timed_nothing_is_known() -> None:
    def ways() -> fastest.Ways:
        raise torch.OutOfMemoryError("CUDA out of memory")

    found = timings_here("op", "shape", CPU, ways)
    assert found.order == [] and all_timings(CPU) == []
    assert fastest.ranked({"torch": None, "triton": "none"}, found) == {"torch": None, "triton": "none"}


def test_the_callers_modes_and_draws_are_left_alone() -> None:
    seen = []

    def way() -> object:
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return torch.ones(2, requires_grad=True).exp().sum().backward()

    state, packed = torch.get_rng_state(), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), hooks:
        timings_here("op", "shape", CPU, lambda: {"way": way})
    assert set(seen) == {(True, False)} and not packed
    assert torch.equal(torch.get_rng_state(), state)


def test_turns_are_flipped_and_the_first_two_rounds_do_not_count() -> None:
    calls: list[str] = []
    found = in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, CPU, rounds=4)
    assert [len(ms) for ms in found.values()] == [4, 4]
    assert "".join(calls) == "baab" * 3


def test_nothing_is_remembered_where_nothing_was_timed() -> None:
    assert all_timings(CPU) == []
