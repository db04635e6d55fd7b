"""The grid of ways to train: its cells on a tiny model, and its arithmetic of equal time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.methods import deploy
from bench.runner import asked_of
from tests.cli.conftest import save_llama

SETTINGS = {"steps": 4, "rounds": 3, "evals": 2, "eval_tokens": 64, "dtype": "fp32"}
TOKENS = {"method": "token_selection", "keep_ratio": 0.25, "pool": "targets"}
ATTENTION = {"method": "pq_attention", "num_keys": 40, "block_q": 8, "block_k": 8, "local_tokens": 4}


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """Prompts of 40 letters with completions of 7."""
    rows = [{"prompt": f"{number:03}" + "abcd efg " * 5, "completion": f"{number % 7} is it"} for number in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {"model": str(save_llama(tmp_path / "model")), "data": str(data), "task": "sft", "seq_len": 64}
    return {**recipe, "methods": [], "calibration_tokens": 256, "eval_tokens": 64, "save_every": 0, "lr": 1e-3}


def test_the_rows_of_a_run(values: dict[str, Any]) -> None:
    found = deploy.rows(values, 4)
    assert found["rows"] == 4 and found["tokens"] == [56, 56]  # 48 + 7 letters, and the end
    assert found["target_share"] == pytest.approx(8 / 56) and found["target_shares"] == [0.1429, 0.1429]


def test_a_step_and_its_memory(values: dict[str, Any]) -> None:
    sparse = {**values, "methods": [TOKENS, ATTENTION]}
    timed = deploy.ratio(sparse, 3, 1)
    assert timed["ratio"]["median"] > 0 and len(timed["ratio"]["candidate_s"]) == 3
    assert timed["dense_phase_ratio"] > 0  # attention ends dense
    dense, ours = deploy.memory(values, 1), deploy.memory(sparse, 1)
    assert dense["selected_share"] is None and ours["selected_share"] == pytest.approx(0.25, abs=0.01)
    assert ours["saved_bytes"] < dense["saved_bytes"] and ours["peak_bytes"] > 0


def test_a_run_has_the_quality_of_the_dense_model_along_its_way(values: dict[str, Any]) -> None:
    dense = deploy.train(values, 4, 0, None, SETTINGS, 1)
    assert [point["step"] for point in dense["evals"]] == [0, 2, 4] and dense["loss"] == dense["evals"][-1]["loss"]
    ours = deploy.train({**values, "methods": [TOKENS]}, 6, 0, dense["start"], SETTINGS, 1)
    assert ours["steps"] == 6 and ours["evals"][0]["loss"] == dense["evals"][0]["loss"] == dense["start"]["loss"]
    assert ours["loss"] != dense["loss"] and ours["setup_s"] > 0


@pytest.mark.parametrize(
    ("sparse", "phase", "shares", "steps"),
    [
        (2.0, None, {}, 160),
        (0.5, None, {}, 40),
        # a quarter of them dense: 128 steps cost 96 / 2 + 32 = 80
        (2.0, 1.0, {"dense_first": 0.0, "dense_last": 0.25}, 128),
        # their dense phase costs twice as much as dense training's: 96 / 2 + 32 * 2 = 112
        (2.0, 0.5, {"dense_first": 0.0, "dense_last": 0.25}, 91),
    ],
)
def test_as_many_steps_as_the_time_has_room_for(
    sparse: float, phase: float | None, shares: dict[str, float], steps: int
) -> None:
    recipe = {"model": "none", "data": "none", "methods": [ATTENTION], **shares}
    measured = {"ratio": {"median": sparse}, "dense_phase_ratio": phase}
    assert deploy.equal_time_steps(recipe, 80, measured) == steps


def test_every_arm_is_a_recipe_and_what_a_cell_uses_stands_before_it() -> None:
    from sparsetrain.recipes.finetune import Recipe

    settings = deploy.BENCHMARKS[0].settings
    for data in deploy.DATA:
        for arm in deploy.arms(data).values():
            assert Recipe.from_values(deploy.recipe_of(data, arm, settings)).deploy == "dense"
    before: set[str] = set()
    for cell in deploy.cells(asked_of(deploy.BENCHMARKS[0])):
        assert set(cell.uses) <= before, cell.key
        before.add(cell.key)
    assert "gsm8k tokens-0.3 time 2" in before and "gsm8k spt time 0" in before and "gsm8k spt time 1" not in before
