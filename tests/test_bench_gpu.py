"""The GPU's benchmark of whole steps, tried on a CPU at a tiny shape; and that nothing is timed over a red test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.gpu import long_rows, steps
from bench.runner import asked_of, run

(BENCHMARK,) = steps.BENCHMARKS
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmark itself runs here")


def test_it_runs_from_correctness_to_a_ratio(tmp_path: Path) -> None:
    """Takes some three seconds: two models are built and train."""
    asked = asked_of(BENCHMARK, quick=True, only="1b 48 targets at the end r=.1 / lora+checkpointing")
    run(BENCHMARK, asked, output=tmp_path, say=lambda _: None)
    found = json.loads((tmp_path / "gpu_steps.json").read_text())["results"]
    assert found["correctness"]["passed"] and found["correctness"]["all tokens beside dense"] < 1e-4
    (row,) = (row for key, row in found.items() if key != "correctness")
    assert row["ratio"] == row["eager"]["median"] > 0 and row["against"] == "lora+checkpointing"


@pytest.mark.slow  # four models are built and train, and one is traced
def test_very_long_rows_run_to_the_whole_model(tmp_path: Path) -> None:
    (benchmark,) = long_rows.BENCHMARKS
    run(benchmark, asked_of(benchmark, quick=True), output=tmp_path, say=lambda _: None)
    found = json.loads((tmp_path / "gpu_long_rows.json").read_text())["results"]
    assert found["correctness"]["passed"] and found["8b 200"]["ratio"] > 0
    assert found["whole 8b 200, keys and values on the host"]["planned_bytes"] > 0


def test_the_most_telling_cells_come_first() -> None:
    keys = [cell.key for cell in BENCHMARK.cells(asked_of(BENCHMARK))]
    assert keys[:2] == ["correctness", "1b 8192 tokens r=.3 / lora"] and len(keys) == 25


def test_nothing_is_timed_over_a_red_test() -> None:
    asked = asked_of(BENCHMARK, quick=True)
    with pytest.raises(SystemExit, match="red test"):
        steps.measured(asked, "1b", "tokens r=.3", "lora", 48, {"passed": False})
