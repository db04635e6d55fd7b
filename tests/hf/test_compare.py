"""compare(): two processes in turns; what they report, and what happens when one of them fails."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from sparsetrain.core.errors import CheckpointError, PlanError
from sparsetrain.hf.model.io import load
from sparsetrain.hf.study.compare import Comparison, compare
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.measure import load_report
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.runs.comparison import leaving_nothing_useless
from tests.hf import runs


def recipe(folder: Path, **changes: Any) -> Recipe:
    return runs.recipe(folder, **({"methods": [runs.ROUTED], "compare": "dense", "threads": 1} | changes))


def losses(result: dict[str, Any]) -> list[float]:
    return [row["loss"] for row in result["run"]["steps"]]


def children() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


def test_there_must_be_something_to_compare(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="something to compare"):
        compare(recipe(tmp_path, methods=[]))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_both_sides_train_as_they_would_alone_in_turns(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    sparse = {"methods": [runs.ROUTED], "distill_steps": 2}
    made = compare(recipe(tmp_path, **sparse), report=events.append)
    for side, result in (("sparse", made.sparse), ("dense", made.dense)):
        own = sparse if side == "sparse" else {}
        alone = finetune(runs.recipe(tmp_path, output=str(tmp_path / side), **own), write=False)
        assert losses(result) == [row["loss"] for row in alone.run["steps"]]
        assert result["run"]["perplexity"] == alone.run["perplexity"]
        assert result["run"]["peak_rss_bytes"] > 2**26
    assert made.sparse["data_order"] == made.dense["data_order"]

    # one step each, the order flipped each round
    order = [(event["side"], event["step"]) for event in events if event["event"] == "step"]
    rounds = [("dense", "sparse") if step % 2 else ("sparse", "dense") for step in range(1, 7)]
    assert order == [(side, step) for step, sides in enumerate(rounds, 1) for side in sides]

    report = load_report(tmp_path / "out" / "report.json")
    assert set(report["runs"]) == {"sparse", "dense"} and report["timing"]["median"] > 0  # type: ignore[index]
    # five pairs of the run decide nothing; six or twelve more are timed then, or none was in time
    assert len(report["timing"]["baseline_s"]) >= 5 + 6  # type: ignore[index]
    beside: Any = report["checkpointing"]  # type: ignore[typeddict-item]
    assert beside["num_pairs"] == 3 and beside["time_ratio"] > 0 and beside["peak_rss_bytes"] > 2**26
    rows = [result["run"]["evals"][-1]["by_row"] for result in (made.sparse, made.dense)]
    assert rows[0]["count"] == rows[1]["count"] and len(rows[0]["loss"]) == len(rows[0]["count"]) >= 6
    for result, row in zip((made.sparse, made.dense), rows, strict=True):
        mean = sum(row["loss"]) / sum(row["count"])
        assert mean == pytest.approx(result["run"]["evals"][-1]["loss"], rel=1e-6)
    judged = {judgement["quantity"]: judgement for judgement in report["judgements"]}
    assert {"low", "high"} <= set(judged["quality"]) and "checkpointing" in judged["peak_memory"]
    said = [result["run"]["samples"] for result in (made.sparse, made.dense)]
    assert [each["prompt"] for each in said[0]] == [each["prompt"] for each in said[1]] and len(said[0]) == 3
    assert judged.keys() >= {
        "time_per_step",
        "loss_at_equal_steps",
        "loss_at_equal_time",
        "saved_activations",
        "quality",
    }
    assert any("same rows in the same order" in note for note in report["notes"])
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    assert load(tmp_path / "out").handle is not None
    assert children() == []


def interrupt_at(side: str, step: int) -> Any:
    def tell(event: dict[str, Any]) -> None:
        if event["event"] == "step" and (event["side"], event["step"]) == (side, step):
            raise KeyboardInterrupt

    return tell


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    asked = recipe(tmp_path)
    again = asked.model_copy(update={"resume": True})
    with pytest.raises(KeyboardInterrupt):
        compare(asked, report=interrupt_at("dense", 1))
    assert not (tmp_path / "out").exists()
    heard: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):  # nothing to go on from: both sides start again
        compare(again, report=lambda event: (heard.append(event), interrupt_at("dense", 3)(event)))
    lines = [event["side"] for event in heard if "starting from the beginning" in event.get("text", "")]
    assert sorted(lines) == ["dense", "sparse"]
    assert children() == []
    with pytest.raises(KeyboardInterrupt):  # the sparse side is done then, the dense one about to be
        compare(again, report=interrupt_at("dense", 6))
    with pytest.raises(CheckpointError, match=r"written by another recipe.*lr"):
        compare(again.model_copy(update={"lr": 1e-3}))
    made: Comparison = compare(again)
    assert made.sparse["resumed_from"] == 2 and made.dense["resumed_from"] in (2, 4, 6)
    for side, result, methods in (("a", made.sparse, [runs.ROUTED]), ("b", made.dense, [])):
        alone = finetune(runs.recipe(tmp_path, output=str(tmp_path / side), methods=methods), write=False)
        assert losses(result) == [row["loss"] for row in alone.run["steps"]]
    with pytest.raises(CheckpointError, match="finished comparison"):
        compare(again)


@pytest.mark.slow
def test_when_one_side_is_killed_the_other_is_stopped_and_it_is_said(tmp_path: Path) -> None:
    def kill_the_idle_side(event: dict[str, Any]) -> None:
        if event["event"] == "step" and (event["side"], event["step"]) == ("dense", 1):
            oldest = min(children(), key=lambda process: process.create_time())
            os.kill(oldest.pid, signal.SIGKILL)
            time.sleep(0.2)

    with pytest.raises(RuntimeError, match="the sparse side was killed by signal 9"):
        compare(recipe(tmp_path), report=kill_the_idle_side)
    assert children() == []


@pytest.mark.slow
def test_a_side_s_error_comes_back_as_it_was_and_nothing_is_written(tmp_path: Path) -> None:
    asked = recipe(tmp_path, methods=[runs.ROUTED, runs.ROUTED | {"layers": [1]}])
    with pytest.raises(PlanError, match=r"sparse side: .*both claim") as caught:
        compare(asked)
    assert "Traceback" in caught.value.__notes__[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "new", "kept"),
    [
        ("dense/checkpoint-2/step.bin", True, False),  # killed in the middle of writing
        ("dense/checkpoint-2/manifest.json", True, True),
        ("dense/checkpoint-2/sparsetrain.json", True, False),
        ("dense/result.json", True, True),  # without checkpoints (save_every=0) this is all that a finished side leaves
        ("dense/journal.jsonl", True, False),
        ("dense/journal.jsonl", False, True),
    ],
)
def test_what_a_comparison_leaves_when_it_ends_early(made: str, new: bool, kept: bool, tmp_path: Path) -> None:
    output, file = tmp_path / "run", tmp_path / "run" / made
    with pytest.raises(KeyboardInterrupt), leaving_nothing_useless(output, new):
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"format": 1, "fingerprint": "x"}))
        raise KeyboardInterrupt
    assert file.exists() == output.exists() == kept


def test_a_conversion_that_fails_after_dense_has_begun_leaves_nothing(tmp_path: Path) -> None:
    steps: list[str] = []

    def count(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            steps.append(event["side"])

    asked = recipe(tmp_path, methods=[runs.ROUTED | {"partition": "clustered"}], calibration_tokens=0)
    with pytest.raises(ValueError, match=r"sparse side: .*needs calibration"):
        compare(asked, report=count)
    assert steps == ["dense"] and not (tmp_path / "out").exists()
