"""What is timed after a comparison: when, for how long, with which recipes; and that it costs nothing when it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparsetrain.methods import TokenSelection
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.runs import extra_turns as module
from sparsetrain.runs.comparison import paired_steps
from sparsetrain.runs.extra_turns import CHECKPOINTING, Extra, extra_turns, timed_recipe, undecided

ROUTED: dict[str, Any] = {"method": "routed_ffn", "num_blocks": 4, "num_active": 2}


def recipe(**changes: Any) -> Recipe:
    given = {"model": "m", "data": "d", "methods": [ROUTED], "steps": 40, "warmup_steps": 5, "compare": "dense"}
    return Recipe.from_values(given | changes)


def answers(dense: float, sparse: float, recomputed: float, told: list[Any] | None = None) -> Any:
    """A `time_in_turns` of known steps."""

    def time_in_turns(work: str, jobs: Any, report: Any, wanted: Any) -> Any:
        pace = {"dense": dense, "sparse": sparse, CHECKPOINTING: recomputed}
        seconds: dict[str, list[float]] = {name: [] for name in jobs}
        if told is not None:
            told.append(jobs)
        while going := wanted(seconds):
            for name in going:
                seconds[name].append(pace[name])

        def peaks(name: str) -> list[Any]:  # each step a little more; checkpointing half of dense
            grows = [(i + 1) * (5 if name == CHECKPOINTING else 10) for i in range(len(seconds[name]))]
            return [{"peak_rss_bytes": peak, "peak_gpu_bytes": None} for peak in grows]

        return {name: {"seconds": each, "peaks": peaks(name)} for name, each in seconds.items()}

    return time_in_turns


def extra(pairs: Any, asked: Recipe | None = None) -> Extra:
    return extra_turns("m:f", {"job": "finetune"}, asked or recipe(), {}, pairs, 100.0, lambda _: None)


def test_a_decided_run_is_asked_about_checkpointing_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(module, "time_in_turns", answers(1.0, 0.5, 1.3, told))
    found = extra(([1.0] * 10, [0.5] * 10))
    assert list(told[0]) == [CHECKPOINTING, "dense"] and found.pairs == ([], [])
    assert found.checkpointing is not None and found.checkpointing["time_ratio"] == pytest.approx(1.3)
    assert (found.checkpointing["num_pairs"], found.checkpointing["peak_rss_bytes"]) == (3, 15)


def test_an_undecided_run_gets_more_pairs_until_it_is_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "time_in_turns", answers(1.0, 0.5, 1.3))
    found = extra(([1.0] * 5, [0.5] * 5))
    assert found.pairs == ([1.0] * 6, [0.5] * 6)
    assert found.checkpointing is not None and found.checkpointing["dense_rss_bytes"] == 30  # in the same three steps
    wild = ([1.0, 2.0] * 5, [1.9, 1.0] * 5)
    monkeypatch.setattr(module, "time_in_turns", answers(1.0, 1.04, 1.3))
    assert len(extra(wild).pairs[0]) == 12  # and no more


def test_the_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10_000, 25))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(module, "time_in_turns", answers(1.0, 0.5, 1.3))
    found = extra(([1.0] * 5, [0.5] * 5))
    assert len(found.pairs[0]) == 3 and found.checkpointing is not None  # over 60 s before the fourth round


def test_what_fails_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise MemoryError("the dense + checkpointing side ran out of memory\nand so on")

    monkeypatch.setattr(module, "time_in_turns", fail)
    found = extra(([1.0] * 10, [0.5] * 10))
    assert found.checkpointing is None
    assert found.notes == [
        "dense + checkpointing could not be timed beside dense: the dense + checkpointing side ran out of memory"
    ]


def test_nothing_is_timed_where_nothing_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "time_in_turns", lambda *_: pytest.fail("no side is needed"))
    assert extra(([1.0] * 10, [0.5] * 10), recipe(gradient_checkpointing="non-reentrant")) == Extra()


def test_many_pairs_are_enough_whatever_they_say() -> None:
    noise = ([1.0, 2.0] * 20, [2.0, 1.0] * 20)
    assert not undecided(recipe(), noise) and undecided(recipe(), (noise[0][:20], noise[1][:20]))


def test_sides_that_are_timed_do_the_ordinary_step_and_little_else(tmp_path: Path) -> None:
    asked = recipe(epochs=None, eval_every=5, save_every=5, resume=True, dense_first=0.1)
    dense = timed_recipe(asked, "dense", {"distill_steps": 0}, tmp_path)
    beside, sparse = (timed_recipe(asked, name, {"distill_steps": 0}, tmp_path) for name in (CHECKPOINTING, "sparse"))
    for made in (dense, beside, sparse):
        assert (made.eval_every, made.save_every, made.warmup_steps, made.eval_tokens) == (0, 0, 0, 1)
        assert made.compare == "none" and not made.resume and made.steps == 18
        assert Recipe(**made.model_dump(mode="json")) == made  # a side gets it as JSON
    assert dense.methods == beside.methods == () and dense.gradient_checkpointing == "none"
    assert beside.gradient_checkpointing == "non-reentrant" and sparse.methods
    assert isinstance(sparse, Recipe) and (sparse.dense_first, sparse.dense_last) == (0, 0)
    stays = timed_recipe(recipe(deploy="sparse", distill_steps=2), "sparse", {}, tmp_path)
    assert isinstance(stays, Recipe) and stays.distill_steps == 0
    assert Recipe(**stays.model_dump(mode="json")) == stays


def results(steps: int) -> dict[str, Any]:
    def run(seconds: float) -> dict[str, Any]:
        return {"run": {"steps": [{"step": i, "step_time_s": seconds + i / 1000} for i in range(1, steps + 1)]}}

    return {"dense": run(1.0), "sparse": run(0.5)}


def test_steps_in_which_the_sparse_side_trains_dense_are_no_pairs() -> None:
    """Of 20 steps the first and the last four are dense; the first is left out anyway."""
    dense, sparse = paired_steps(recipe(steps=20), results(20))
    assert [round(1000 * (s - 0.5)) for s in sparse] == list(range(2, 17)) and len(dense) == 15
    exact = recipe(steps=20, methods=[{"method": "token_selection", "keep_ratio": 0.5}])
    assert not TokenSelection(keep_ratio=0.5).changes_outputs
    assert len(paired_steps(exact, results(20))[0]) == 19
    assert len(paired_steps(recipe(steps=20, deploy="sparse"), results(20))[0]) == 19
