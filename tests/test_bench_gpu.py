"""The GPU's benchmarks, tried on a CPU at tiny shapes; what makes them red; and the command that runs them all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as bench_command
from bench.gpu import host_work, long_rows, parts, steps
from bench.ops import sparse24_gpu
from bench.planner import accuracy_gpu
from bench.runner import asked_of, run
from sparsetrain.ops.selected_rows import attention

(BENCHMARK,) = steps.BENCHMARKS
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmark itself runs here")


def test_it_runs_from_correctness_to_a_ratio(tmp_path: Path) -> None:
    """Takes some six seconds: seven models are built and train, and two are traced."""
    asked = asked_of(BENCHMARK, quick=True, only="1b 160 tokens r=.3 + sparse attention / lora+checkpointing")
    run(BENCHMARK, asked, output=tmp_path, say=lambda _: None)
    found = json.loads((tmp_path / "gpu_steps.json").read_text())["results"]
    assert found["correctness"]["passed"] and found["correctness"]["steps"].keys() == steps.SIDES.keys()
    assert all(step["error"] < 1e-4 for step in found["correctness"]["steps"].values())
    (row,) = (row for key, row in found.items() if key != "correctness")
    assert row["ratio"] == row["eager"]["median"] > 0 and row["against"] == "lora+checkpointing"
    for side in ("baseline", "candidate"):
        assert row[f"{side}_saved_bytes"] > 0 and row[f"{side}_planned_bytes"] > 0
    assert row["saved_ratio"] == row["candidate_saved_bytes"] / row["baseline_saved_bytes"]


@pytest.mark.parametrize("side", ["tokens r=.3", "tokens r=.3, keys train"])
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_wrong_gradient_of_attention_is_red(side: str, broken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of dq, dk and dv is a twentieth too large in the backend that runs here, and the definition is not."""
    right = attention.backward_by_tiles

    def wrong(*args: Any) -> Any:
        found = list(right(*args))
        found[broken] = found[broken] * 1.05
        return tuple(found)

    asked = asked_of(BENCHMARK, quick=True)
    monkeypatch.setattr(attention, "backward_by_tiles", wrong)
    found = steps.beside_reference(asked, side)
    assert not found["passed"] and 1e-3 < found["error"] < 1 and found["of the definition"] == 0


def test_one_red_step_fails_the_check_and_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "beside_reference", lambda _, side: {"passed": side != "spt"})
    found = steps.correctness(asked_of(BENCHMARK, quick=True))
    assert not found["passed"]
    for measure in (
        lambda: steps.measured(asked_of(BENCHMARK, quick=True), None, "1b", "spt", "lora", 160, found),  # type: ignore[arg-type]
        lambda: long_rows.pair(asked_of(long_rows.BENCHMARKS[0], quick=True), 200, found),
    ):
        with pytest.raises(SystemExit, match="red test"):
            measure()


def test_the_furthest_gradient_is_named() -> None:
    wanted = {"loss": torch.ones(()), "a": torch.ones(4), "b": torch.full((4,), 1e-6)}
    assert steps.furthest({**wanted, "a": torch.full((4,), 1.5)}, wanted) == (0.5, "a")
    assert steps.furthest({**wanted, "b": torch.zeros(4)}, wanted)[0] == pytest.approx(1e-3)  # beside a's, nothing
    assert steps.furthest({**wanted, "b": torch.full((4,), torch.nan)}, wanted)[1] == "b"
    assert steps.furthest({"loss": wanted["loss"], "a": wanted["a"]}, wanted)[0] == float("inf")


@pytest.mark.slow  # eight models are built and train, and one is traced
def test_very_long_rows_run_to_the_whole_model(tmp_path: Path) -> None:
    (benchmark,) = long_rows.BENCHMARKS
    run(benchmark, asked_of(benchmark, quick=True), output=tmp_path, say=lambda _: None)
    found = json.loads((tmp_path / "gpu_long_rows.json").read_text())["results"]
    assert found["correctness"]["passed"] and found["8b 200"]["ratio"] > 0
    assert found["whole 8b 200, keys and values on the host"]["planned_bytes"] > 0


def test_every_benchmark_takes_rounds_enough_for_quartiles() -> None:
    for benchmark in (*steps.BENCHMARKS, *long_rows.BENCHMARKS):
        for quick in (False, True):
            assert asked_of(benchmark, quick=quick).settings["rounds"] >= 3


def test_the_most_telling_cells_come_first() -> None:
    keys = [cell.key for cell in BENCHMARK.cells(asked_of(BENCHMARK))]
    assert keys[:2] == ["correctness", "1b 8192 tokens r=.3 / lora"] and len(keys) == 53
    pairs = steps.pairs_of(BENCHMARK.settings)
    aimed = [(tokens, side, against) in steps.TARGETS for tokens, _, side, against in pairs]
    assert sum(aimed) == 2 * len(steps.TARGETS) and all(aimed[: sum(aimed)])
    assert not any(tokens == 2048 and "sparse" in side for tokens, _, side, _ in pairs)  # as many keys as tokens


# ---- 2:4, plans and the host's work ----


def test_2_4_products_are_tried_by_emulation() -> None:
    (benchmark,) = sparse24_gpu.BENCHMARKS
    (row,) = run(benchmark, asked_of(benchmark, quick=True), output=None, say=lambda _: None)["cells"].values()
    assert row["checks"]["passed"] and row["backend"] == "emulate" and row["verdict"] in ("go", "no-go")
    assert {"forward", "dx", "pack_ms", "search_ms", "algorithm"} <= row["up"].keys() and row["ffn_dense_ms"] > 0
    assert len(benchmark.cells(asked_of(benchmark))) == 8


def test_wrong_2_4_products_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse24_gpu, "multiply_backward", lambda dy, packed, operand: 1.1 * (dy @ operand))
    row = sparse24_gpu.measure(32, 64, 64, 3, torch.device("cpu"))
    assert row["verdict"] == "refused" and "ratio_median" not in row and not row["checks"]["passed"]


@pytest.mark.slow  # an encoder is traced and trains
def test_plans_are_tried_on_one_small_model() -> None:
    (benchmark,) = accuracy_gpu.BENCHMARKS
    (row,) = run(benchmark, asked_of(benchmark, quick=True), output=None, say=lambda _: None)["cells"].values()
    assert row["predicted"]["peak"] > 0 and row["measured"]["step_s"] > 0 and "peak" not in row["measured"]


def test_the_hosts_work_is_counted() -> None:
    """Takes some three seconds: four models run a few steps."""
    dense, tokens = (host_work.measure(way, 160, 1) for way in ("dense", "tokens r=.3, as on a GPU"))
    assert dense["reads_per_layer"] == tokens["reads_per_layer"] == 0
    assert dense["launches_per_layer"] < tokens["launches_per_layer"] <= 1.25 * dense["launches_per_layer"]
    assert tokens["calls_per_layer"] <= 6 * dense["calls_per_layer"]  # 13 where a mode looks into every call


# ---- the command ----


def test_a_part_that_fails_or_hangs_stops_no_later_one(tmp_path: Path) -> None:
    def python(name: str, code: str, minutes: float = 1.0) -> parts.Part:
        return parts.Part(name, (sys.executable, "-c", code), minutes)

    said: list[str] = []
    wanted = [
        python("red", "raise SystemExit(3)"),
        python("hangs", "import time; time.sleep(60)", 0.01),
        python("last", f"open({str(tmp_path / 'ran')!r}, 'w')"),
    ]
    assert parts.run_all(wanted, said.append) == 2 and (tmp_path / "ran").exists()
    assert said[-1] == "2 of 3 parts failed: red: ended with code 3; hangs: stopped after 0.01 minutes"
    assert parts.run_all(wanted[2:], said.append) == 0


def test_all_parts_fit_ten_minutes_and_each_is_known() -> None:
    found = parts.parts(Path("there"), quick=False)
    assert sum(part.minutes for part in found) <= 10 and found[0].name == "gpu_steps"
    known = bench_command.runner.benchmarks()
    for part in found:
        assert part.name == "tests" or (known[part.name].needs_gpu and part.command[-2:] == ("--output", "there"))
    (tests,) = (part.command for part in found if part.name == "tests")
    assert "tests/ops/test_block_sparse_gpu.py" in tests and "--collect-only" not in tests
    dry = next(part.command for part in parts.parts(None, quick=True, has_gpu=False) if part.name == "tests")
    assert "--collect-only" in dry


def test_without_a_gpu_it_is_refused_at_once(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(parts, "run_all", lambda *_: pytest.fail("began"))
    assert parts.main([], has_gpu=lambda: False) == 2
    assert "QUICK=1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="gpu_steps needs a GPU"):
        bench_command.main(["run", "gpu_steps"])


@pytest.mark.parametrize(("failed", "code"), [(0, 0), (2, 1)])
def test_its_code_says_whether_all_ended_well(failed: int, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "run_all", lambda *_: failed)
    assert parts.main(["--quick"], has_gpu=lambda: False) == code
    assert parts.main([], has_gpu=lambda: True) == code
