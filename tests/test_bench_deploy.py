"""The grid of ways to train: its cells on a tiny model, and its arithmetic of equal time."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.methods.deploy import grid, quality
from bench.runner import asked_of
from bench.tables import automatic
from bench.tables import deploy as tables
from sparsetrain.planner.quality import Deployed
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
    found = quality.rows(values, 4)
    assert (found["rows"], found["tokens"], found["row_of_a_token"]) == (4, 224, 56)  # 48 + 7 letters, and the end
    assert 10_000 < found["parameters"] < 1_000_000
    assert found["target_share"] == pytest.approx(8 / 56) and found["target_shares"] == [0.1429, 0.1429]


def test_a_step_and_its_memory(values: dict[str, Any]) -> None:
    sparse = {**values, "methods": [TOKENS, ATTENTION]}
    timed = quality.ratio(sparse, 3, 1)
    assert timed["ratio"]["median"] > 0 and len(timed["ratio"]["candidate_s"]) >= 3
    assert timed["dense_phase_ratio"] > 0  # attention ends dense
    dense, ours = quality.memory(values, 1), quality.memory(sparse, 1)
    assert dense["selected_share"] is None and ours["selected_share"] == pytest.approx(0.25, abs=0.01)
    assert ours["saved_bytes"] < dense["saved_bytes"] and ours["peak_bytes"] > 0


def test_a_run_has_the_quality_of_the_dense_model_along_its_way(values: dict[str, Any]) -> None:
    dense = quality.train(values, 4, 0, None, SETTINGS, 1)
    assert [point["step"] for point in dense["evals"]] == [0, 2, 4] and dense["loss"] == dense["evals"][-1]["loss"]
    ours = quality.train({**values, "methods": [TOKENS]}, 6, 0, dense["start"], SETTINGS, 1)
    assert ours["steps"] == 6 and ours["evals"][0]["loss"] == dense["evals"][0]["loss"] == dense["start"]["loss"]
    assert ours["loss"] != dense["loss"] and ours["setup_s"] > 0


@pytest.mark.parametrize(
    ("sparse", "phase", "shares", "steps"),
    [
        (2.0, None, {}, 160),
        (0.5, None, {}, 40),
        (2.0, None, {"deploy": "sparse"}, 160),
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
    assert quality.equal_time_steps(recipe, 80, measured) == steps


def test_every_arm_is_a_recipe_and_what_a_cell_uses_stands_before_it() -> None:
    from sparsetrain.recipes.finetune import Recipe

    settings = quality.BENCHMARKS[0].settings
    for data in grid.DATA:
        for arm in grid.arms(data).values():
            assert Recipe.from_values(grid.recipe_of(data, arm, settings)).task == grid.DATA[data]["task"]
    before: set[str] = set()
    for cell in quality.cells(asked_of(quality.BENCHMARKS[0])):
        assert set(cell.uses) <= before, cell.key
        before.add(cell.key)
    assert "gsm8k tokens-0.5 time 2" in before and "chitchat-256 tokens-0.5 time 1" not in before
    assert "python-docstrings-2GB dense-checkpointing time 0" in before and "long-docstrings auto" in before
    assert "gsm8k spt time 0" in before and "gsm8k spt time 1" not in before


def recorded(loss: float, steps: int = 80, setup: float = 0.0) -> dict[str, Any]:
    return {"loss": loss, "accuracy": None, "steps": steps, "setup_s": setup, "start": {"loss": 3.0}}


@pytest.fixture
def results() -> dict[str, Any]:
    """Token selection with two seeds, ln 1.01 and ln 1.03 above dense at equal steps; attention with one."""
    up = {percent: math.log(1 + percent / 100) for percent in (1, 3, -10, -8, 5)}
    timed = {"ratio": {"median": 1.9, "q1": 1.8, "q3": 2.0}, "dense_phase_ratio": None}
    cells = {
        "python-docstrings rows": {"row_of_a_token": 880.0, "parameters": 1000}
        | {"target_share": 0.054, "target_shares": [0.016, 0.125]},
        "python-docstrings dense step": {"peak_bytes": 2000, "saved_bytes": 1000},
        "python-docstrings dense steps 0": recorded(2.0),
        "python-docstrings dense steps 1": recorded(2.5),
        "python-docstrings tokens-0.15 step": {**timed, "peak_bytes": 1200, "saved_bytes": 150, "selected_share": 0.15},
        "python-docstrings tokens-0.15 steps 0": recorded(2.0 + up[1]),
        "python-docstrings tokens-0.15 steps 1": recorded(2.5 + up[3]),
        "python-docstrings tokens-0.15 time 0": recorded(2.0 + up[-10], 152),
        "python-docstrings tokens-0.15 time 1": recorded(2.5 + up[-8], 152),
        "python-docstrings attention step": {**timed, "peak_bytes": 2100, "saved_bytes": 900, "selected_share": None},
        "python-docstrings attention steps 0": recorded(2.0 + up[5], setup=3.0),
        "python-docstrings attention time 0": recorded(2.0 + up[5], 130),
        "python-docstrings spt steps 1": recorded(2.5),  # its step is not timed yet
    }
    return {"settings": quality.BENCHMARKS[0].settings, "results": cells}


def test_the_table_says_who_won_at_equal_time(results: dict[str, Any]) -> None:
    lines = tables.deploy(results)
    assert "5 % of them targets" in lines[0] and "loss 2.250 (before: 3.000)" in lines[0]
    tokens, attention, spt = lines[4:]
    assert tokens == (
        "| tokens-0.15 | 1.90 (1.80–2.00) | 0.60 | 0.15 | 0.15 | 2 | +2.0 ± 1.0 % | -9.0 ± 1.0 % | 152 | 0 | tie |"
    )
    assert attention.split(" | ")[-3:] == ["130", "3", "loss |"] and "+5.0 %" in attention
    assert spt.split(" | ")[1] == "–" and spt.endswith("| – | 0 | – |")
    said = tables.conclude_deploy({"deploy": results})
    assert said.endswith("python-docstrings: tokens-0.15 (tie); attention (loss).")
    assert "Not measured" in tables.conclude_deploy({}) and "Not measured" not in lines[0]


def test_the_verdict_of_seeds() -> None:
    def verdict(*values: float, error: float | None = None) -> str:
        return tables.Difference(list(values), error).verdict

    assert [verdict(0.009), verdict(-0.011), verdict(0.011), verdict()] == ["tie", "win", "loss", "–"]
    assert verdict(0.02, error=0.0101) == "tie" and verdict(0.02, error=0.0099) == "loss"  # over held-out rows
    assert verdict(0.01, 0.03, error=0.01) == "tie"  # Student's factor of two seeds is 12.7, of three 4.3
    assert verdict(-0.08, -0.08, -0.08, error=0.019) == "tie" and verdict(-0.08, -0.08, -0.08, error=0.018) == "win"


def test_one_seed_s_error_is_that_of_its_rows(results: dict[str, Any]) -> None:
    """Rows of 2, 1 and 1 targets, ours .04, .03 and .01 above dense: .02 a target, residuals 0, .01 and -.01."""
    cells = results["results"]
    cells["python-docstrings dense steps 0"]["by_row"] = {"count": [2.0, 1.0, 1.0], "loss": [4.0, 2.0, 2.0]}
    cells["python-docstrings attention steps 0"]["by_row"] = {"count": [2.0, 1.0, 1.0], "loss": [4.04, 2.03, 2.01]}
    (attention,) = [row for row in tables.rows_of(cells)["python-docstrings"] if row.name == "attention"]
    found = attention.difference("steps")
    assert found.error == pytest.approx(math.sqrt(0.0002 * 3 / 2) / 4) and "±" in found.text
    assert attention.difference("time").error is None  # its rows were not kept


def test_the_evidence_says_where_it_holds(results: dict[str, Any]) -> None:
    found = tables.evidence(results)
    assert list(found) == ["token_selection", "pq_attention"]  # spt is half measured
    (entry,) = found["token_selection"]
    assert entry["setting"] == {"keep_ratio": 0.15, "pool": "targets"} and "with" not in entry
    where = {"task": ["sft"], "trained": ["lora"], "parameters": [250, 4000], "seq_len": [440, 1760]}
    where |= {"target_share": [0.0, 0.125]}  # nine rows in ten have fewer targets than are selected
    beside = {"equal_steps": 0.02, "equal_time": -0.09, "speedup": 1.9, "peak": 0.6, "seeds": 2}
    assert entry["deployed"] == where | beside
    assert found["pq_attention"][0]["deployed"]["target_share"] == [0.016, 0.125]
    assert "+2.0 ± 1.0 % at equal steps" in entry["text"] and "2 seeds" in entry["text"]


def test_more_seeds_at_equal_time_are_counted_apart(results: dict[str, Any]) -> None:
    del results["results"]["python-docstrings tokens-0.15 steps 1"]
    (entry,) = tables.evidence(results)["token_selection"]
    assert entry["deployed"]["seeds"] == 1 and entry["deployed"]["seeds_time"] == 2
    assert entry["text"].endswith("steps, one seed; at equal time 2 seeds)")
    record = Deployed(methods=(), where={}, text="", source="", seeds=1, seeds_time=2)
    assert record.seeds_text == "1 seed; 2 at equal time" and replace(record, seeds_time=None).seeds_text == "1 seed"


def test_equal_steps_are_evidence_without_equal_time(results: dict[str, Any]) -> None:
    for key in [key for key in results["results"] if "tokens-0.15 time" in key]:
        del results["results"][key]
    (entry,) = tables.evidence(results)["token_selection"]
    assert "equal_time" not in entry["deployed"] and entry["deployed"]["equal_steps"] == 0.02
    assert "± 1.0 % at equal steps beside dense LoRA" in entry["text"]


def test_several_methods_are_one_entry_and_labels_have_an_error_rate(results: dict[str, Any]) -> None:
    cells, timed = results["results"], results["results"]["python-docstrings attention step"]
    cells["python-docstrings spt step"] = timed
    cells["python-docstrings spt time 1"] = recorded(2.4)
    (spt,) = [entry for entry in tables.evidence(results)["pq_attention"] if "with" in entry]
    assert [other["method"] for other in spt["with"]] == ["routed_ffn"] and spt["setting"]["keep_ratio"] == 0.25
    facts = {"row_of_a_token": 200.0, "parameters": 1000, "target_share": None, "target_shares": None}
    cells |= {"movie-reviews rows": facts, "movie-reviews dense steps 0": {**recorded(0.5), "accuracy": 0.8}}
    cells |= {"movie-reviews tokens-0.3 step": timed, "movie-reviews dense step": timed}
    cells |= {f"movie-reviews tokens-0.3 {kind} 0": {**recorded(0.5), "accuracy": 0.75} for kind in ("steps", "time")}
    entry = tables.evidence(results)["token_selection"][-1]
    assert entry["deployed"]["equal_steps"] == 0.25 and "target_share" not in entry["deployed"]
    assert "| error rate against dense at equal steps |" in "\n".join(tables.deploy(results))


def test_evidence_written_by_hand_stays_and_the_grid_s_is_replaced(results: dict[str, Any]) -> None:
    files = {path.parent.name: text for path, text in tables.evidence_files({"deploy": results}).items()}
    assert set(files) == {"token_selection", "pq_attention"} and tables.evidence_files({}) == {}
    entries = json.loads(files["token_selection"])
    assert ["deployed" in entry for entry in entries] == [False] * (len(entries) - 1) + [True]
    assert json.loads(tables.written(entries)) == entries


def test_what_was_taken_is_judged_by_the_runs_at_equal_time(results: dict[str, Any]) -> None:
    """Token selection is 9 % better than dense at equal time, attention 5 % worse."""
    cells, name = results["results"], "python-docstrings auto"
    taken = {"taken": "x", "methods": [{**TOKENS, "keep_ratio": 0.15}], "recomputes": False, "seconds": 12.0}
    cells[name] = taken
    (pick,) = automatic.picks(results)
    assert (pick.taken, pick.best, pick.right) == ("tokens-0.15", "tokens-0.15", True) and pick.regret == 0
    cells[name] = {**taken, "methods": []}
    (pick,) = automatic.picks(results)
    assert (pick.taken, pick.right) == ("dense", False) and pick.regret == pytest.approx(1 / 0.91 - 1)
    cells[name] = {**taken, "methods": [], "recomputes": True}
    (pick,) = automatic.picks(results)
    assert (pick.taken, pick.regret, pick.right) == ("dense-checkpointing", None, False)
    text = "\n".join(automatic.automatic(results))
    assert "| not run | wrong |" in text and "0 of 1" in text
    assert "Not measured" in automatic.automatic({"results": {}})[0]
