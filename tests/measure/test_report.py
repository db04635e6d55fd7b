"""The report is honest about who won, complete, self-contained, and never half written."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsetrain.measure import report as report_module
from sparsetrain.measure.judge import LABELS
from sparsetrain.measure.report import build_report, load_report, render_text, write_report
from sparsetrain.measure.schema import Run
from sparsetrain.measure.timing import ratio

MIB = 2**20


def make_run(
    step_s: float, final: float, *, steps: int = 40, saved: int = 100, peak: int = 900, setup: float = 0.0
) -> Run:
    """Loss falls in a straight line from 4 to `final`; held-out every 10 steps, eight rows of unlike difficulty."""
    losses = [4 + (final - 4) * i / steps for i in range(steps + 1)]

    def rows(loss: float) -> dict[str, list[float]]:
        return {"count": [100.0] * 8, "loss": [100 * (loss + 0.3 * (k - 3.5)) for k in range(8)]}

    run: Run = {
        "steps": [
            {"step": i, "loss": losses[i], "step_time_s": step_s, "tokens": 512, "wall_s": step_s * i}
            for i in range(1, steps + 1)
        ],
        "evals": [
            {
                "step": i,
                "wall_s": step_s * i,
                "loss": losses[i],
                "perplexity": math.exp(losses[i]),
                "by_row": rows(losses[i]),
            }
            for i in range(0, steps + 1, 10)
        ],
        "setup_s": setup,
        "perplexity": {"dense": 54.6, "after_training": math.exp(final)},
        "saved_activation_bytes": {"attention": 30 * MIB, "ffn": (saved - 40) * MIB, "norms": 10 * MIB},
        "static_bytes": {"parameters_trainable": MIB, "parameters_frozen": 500 * MIB, "gradients": MIB},
        "peak_rss_bytes": peak * MIB,
    }
    return run


def winners(report: Any) -> dict[str, str]:
    return {judgement["quantity"]: judgement["winner"] for judgement in report["judgements"]}


def full_report() -> Any:
    sparse = make_run(0.5, 3.0, saved=60, peak=700)
    sparse["perplexity"] |= {"after_conversion": 99.5, "after_distillation": 70.25, "after_training": 20.1}
    row = {"method": "routed_ffn", "mflop_before": 5.3, "mflop_after": 2.7, "saved_before": 6720, "saved_after": 2310}
    plan = [{"site": f"layers.{i}.mlp", **row, "added_params": 4616, "note": "4 of 8"} for i in range(3)]
    return build_report(
        title="A model <b>& text",
        runs={"dense": make_run(1.0, 3.0), "sparse": sparse},
        recipe={"model": "m<script>", "lr": 2e-4, "methods": [{"method": "routed_ffn", "num_blocks": 8}]},
        machine={"cpu": "A CPU", "gpus": [], "versions": {"torch": "2.13.0"}},
        plan=plan,
        notes=["layer 2 stood down"],
    )


def test_sparse_is_said_to_win_only_where_it_does() -> None:
    report = full_report()
    assert winners(report) == {
        "time_per_step": "sparse",
        "loss_at_equal_steps": "tie",
        "loss_at_equal_time": "sparse",
        "saved_activations": "sparse",
        "peak_memory": "sparse",
        "quality": "tie",
    }
    assert report["headline"] == (
        "Sparse wins on time per step, loss at equal time, saved activations and peak memory. "
        "A tie on loss at equal steps and quality after training."
    )
    assert report["advice"] == "Sparsity pays here."
    texts = [judgement["text"] for judgement in report["judgements"]]
    assert texts[0] == (
        "A sparse step takes 0.5 s, a dense step 1 s: 2.00× faster. Too few steps were timed in turns, so there is no "
        "interval, and up to 5% is a tie."
    )
    # after 20 s sparse is done and dense is half way between 4 and 3
    assert texts[2] == (
        "Held-out loss after 20 s: 3.000 sparse, 3.500 dense (-0.500), 95% interval -0.500 to -0.500 over the held-out "
        "rows. The dense run was in the middle of its schedule then, at step 20 of 40."
    )
    assert texts[3] == "One step keeps 60.0 MiB of activations sparse, 100 MiB dense: 40% less."


def test_a_losing_sparse_run_is_called_losing() -> None:
    report = build_report(
        title="t", runs={"dense": make_run(1.0, 3.0), "sparse": make_run(1.5, 3.2, saved=120, peak=1000)}
    )
    assert set(winners(report).values()) == {"dense"}
    assert report["headline"].startswith("Dense wins on everything that was measured: time per step, ")
    assert "does not pay" in report["advice"]
    text = "\n".join(render_text(report))
    assert "1.50× slower" in text and "20% more" in text and "11% more" in text and "- Perplexity" in text


def test_faster_steps_that_learn_less_are_no_recommendation() -> None:
    report = build_report(title="t", runs={"dense": make_run(1.0, 2.0), "sparse": make_run(0.9, 3.5)})
    assert winners(report)["time_per_step"] == "sparse" and winners(report)["loss_at_equal_time"] == "dense"
    assert report["advice"].endswith("Train dense.")


def test_setup_counts_as_time() -> None:
    dense = make_run(1.0, 3.0)
    quick = build_report(title="t", runs={"dense": dense, "sparse": make_run(0.5, 3.0)})
    slow = build_report(title="t", runs={"dense": dense, "sparse": make_run(0.5, 3.0, setup=30)})
    late = build_report(title="t", runs={"dense": dense, "sparse": make_run(0.5, 3.0, setup=60)})
    assert winners(quick)["loss_at_equal_time"] == "sparse"
    # at 40 s dense is done; sparse began at 30 s and has done half of its steps
    judgement = slow["judgements"][2]
    assert judgement["winner"] == "dense" and judgement["sparse"] == pytest.approx(3.5)
    assert "30 s of set-up included" in judgement["text"]
    assert late["judgements"][2]["winner"] == "dense"
    assert late["judgements"][2]["text"] == (
        "The dense run was over (40 s) before the sparse run had begun (60 s of set-up)."
    )


def test_interleaved_times_overrule_times_of_separate_runs() -> None:
    runs = {"dense": make_run(1.0, 3.0), "sparse": make_run(0.5, 3.0)}
    timing = ratio([0.9] * 8, [1.0] * 8).to_dict()
    report = build_report(title="t", runs=runs, timing=timing)
    found: Any = report["judgements"][0]
    assert found["winner"] == "dense" and found["ratio"] == pytest.approx(1 / 0.9)
    assert found["text"] == (
        "1.11× slower (98% interval 0.90 to 0.90, 8 pairs of steps timed in turns). "
        "The whole run: 20 s sparse and 40 s dense."
    )
    assert found["low"] == pytest.approx(0.9)


def test_five_pairs_are_a_tie_however_fast() -> None:
    runs = {"dense": make_run(1.0, 3.0), "sparse": make_run(0.5, 3.0, setup=30)}
    few = build_report(title="t", runs=runs, timing=ratio([1.0] * 5, [0.5] * 5).to_dict())["judgements"][0]
    assert few["winner"] == "tie"
    assert few["text"] == (
        "2.00× faster in 5 pairs of steps timed in turns: too few for an interval, so it counts as a tie. The whole "
        "run: 50 s sparse, 30 s of set-up included, and 40 s dense. The set-up is earned back after 60 steps."
    )
    wild = ratio([1.3, 0.9, 1.2, 1.1, 0.95, 1.25, 1.0, 1.05], [1.0] * 8).to_dict()
    found = build_report(title="t", runs=runs, timing=wild)["judgements"][0]
    assert found["winner"] == "tie" and found["text"].startswith("Not told apart from a tie: 1.08× faster (98%")


def test_held_out_differences_are_judged_by_their_rows() -> None:
    """A hundredth of a nat is a win where every row says it, and a tie where rows disagree."""

    def judged(noise: float) -> Any:
        dense, sparse = make_run(1.0, 3.0), make_run(1.0, 3.01)
        rows: Any = sparse["evals"][-1]
        rows = rows["by_row"]
        rows["loss"] = [loss + 100 * noise * (-1) ** k for k, loss in enumerate(rows["loss"])]
        report = build_report(title="t", runs={"dense": dense, "sparse": sparse})
        return {judgement["quantity"]: judgement for judgement in report["judgements"]}

    sure, unsure = judged(0.002), judged(0.05)
    assert sure["quality"]["winner"] == sure["loss_at_equal_steps"]["winner"] == "dense"
    assert unsure["quality"]["winner"] == unsure["loss_at_equal_steps"]["winner"] == "tie"
    assert 0 < sure["quality"]["low"] < 0.01 < sure["quality"]["high"]
    # eight rows, alternating by 0.05: 0.01 ± 2.365 · 0.05 · sqrt(8 / 7) / sqrt(8)
    assert unsure["quality"]["high"] == pytest.approx(0.01 + 2.365 * 0.05 * math.sqrt(1 / 7), abs=1e-4)
    assert "(+1.0%), 95% interval -3.4% to +5.6% over the held-out rows" in unsure["quality"]["text"]


def test_rows_that_are_not_the_same_give_no_interval() -> None:
    dense, sparse = make_run(1.0, 3.0), make_run(1.0, 3.005)
    last: Any = sparse["evals"][-1]
    last["by_row"]["count"] = [50.0] * 8
    judgement = build_report(title="t", runs={"dense": dense, "sparse": sparse})["judgements"][-1]
    assert judgement["winner"] == "tie" and "low" not in judgement
    assert judgement["text"].endswith("(+0.5%) (too few rows for an interval: up to 1.0% is a tie).")


def test_memory_is_judged_against_dense_with_checkpointing_too() -> None:
    runs = {"dense": make_run(1.0, 3.0), "sparse": make_run(0.5, 3.0, peak=700)}
    timing = ratio([1.0] * 8, [0.5] * 8).to_dict()

    def found(peak: int) -> Any:
        beside: Any = {"time_ratio": 1.3, "num_pairs": 3, "peak_rss_bytes": peak * MIB, "peak_gpu_bytes": None}
        beside |= {"dense_rss_bytes": 800 * MIB, "dense_gpu_bytes": None}  # of shorter rows than the whole run's
        return build_report(title="t", runs=runs, timing=timing, checkpointing=beside)

    leaner, fatter = found(560), found(700)
    assert winners(leaner)["peak_memory"] == "dense" and winners(fatter)["peak_memory"] == "sparse"
    judged = {judgement["quantity"]: judgement for judgement in leaner["judgements"]}
    assert judged["peak_memory"]["text"] == (
        "Peak resident memory of the whole process: 700 MiB sparse, 900 MiB dense: 22% less; about 630 MiB "
        "dense + checkpointing, 1.30× slower than dense: sparse takes 11% more than that."
    )
    assert judged["peak_memory"]["ratio"] == pytest.approx(700 / 630)
    assert judged["time_per_step"]["checkpointing"] == pytest.approx(1.3)
    assert leaner["advice"].endswith("For memory alone, dense with gradient checkpointing needs less than sparse.")
    assert fatter["advice"] == "Sparsity pays here."


def test_equal_time_is_judged_only_where_both_were_evaluated() -> None:
    """With two evaluations of a long run, the line between them says nothing of the middle."""
    dense, sparse = make_run(1.0, 3.0), make_run(0.5, 3.0)
    dense["evals"] = [dense["evals"][0], dense["evals"][-1]]  # type: ignore[typeddict-item]
    judged = build_report(title="t", runs={"dense": dense, "sparse": sparse})
    found = {j["quantity"]: j for j in judged["judgements"]}["loss_at_equal_time"]
    assert found["winner"] == "unknown" and "was not evaluated near 20 s" in found["text"]
    assert "equal time" not in judged["headline"] and judged["advice"] == "Sparsity pays here."
    # evaluated after the step in which the time passes
    dense["evals"].insert(1, {"step": 21, "wall_s": 21.0, "loss": 3.2})  # type: ignore[typeddict-item]
    found = build_report(title="t", runs={"dense": dense, "sparse": sparse})["judgements"][2]
    assert (found["dense"], found["winner"]) == (3.2, "sparse")


def test_unequal_lengths_are_compared_at_the_shorter_one() -> None:
    runs = {"dense": make_run(1.0, 3.0, steps=40), "sparse": make_run(1.0, 3.5, steps=20)}
    judgement = build_report(title="t", runs=runs)["judgements"][1]
    assert judgement["winner"] == "tie" and "after 20 steps" in judgement["text"]


def test_without_held_out_losses_the_smoothed_training_loss_is_compared() -> None:
    runs = {"dense": make_run(1.0, 3.0), "sparse": make_run(1.0, 2.5)}
    for run in runs.values():
        del run["evals"]
    judgement = build_report(title="t", runs=runs)["judgements"][1]
    assert judgement["winner"] == "sparse"
    assert judgement["text"].startswith("Training loss (mean of the last 8 steps) after 40 steps")


def test_a_run_that_diverged_loses_and_the_json_stays_valid(tmp_path: Path) -> None:
    sparse = make_run(0.5, 3.0)
    for point in sparse["evals"][2:]:
        point["loss"] = point["perplexity"] = math.nan
    sparse["perplexity"]["after_training"] = math.inf
    report = build_report(title="t", runs={"dense": make_run(1.0, 3.0), "sparse": sparse})
    found = winners(report)
    assert found["loss_at_equal_steps"] == found["loss_at_equal_time"] == found["quality"] == "dense"
    json_path, html_path = write_report(report, tmp_path)
    assert "NaN" not in json_path.read_text() and "Infinity" not in json_path.read_text()
    assert load_report(json_path)["runs"]["sparse"]["perplexity"]["after_training"] is None
    assert "not a number" in html_path.read_text()


def test_accuracy_is_the_quality_of_a_classifier() -> None:
    runs = {"dense": make_run(1.0, 3.0), "sparse": make_run(1.0, 3.0)}
    runs["dense"]["accuracy"], runs["sparse"]["accuracy"] = {"after_training": 0.81}, {"after_training": 0.86}
    judgement = build_report(title="t", runs=runs)["judgements"][-1]
    assert judgement["winner"] == "sparse"
    assert judgement["text"] == (
        "Accuracy after training: 86.0% sparse, 81.0% dense (too few rows for an interval: up to 0.5% points is a tie)."
    )
    rows = [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    for run, right in ((runs["dense"], rows), (runs["sparse"], rows[::-1])):
        last: Any = run["evals"][-1]  # type: ignore[typeddict-item]
        last["by_row"] = {"count": [1.0] * 8, "accuracy": right}
    judgement = build_report(title="t", runs=runs)["judgements"][-1]
    assert judgement["winner"] == "tie" and judgement["low"] == -judgement["high"]  # type: ignore


def test_the_page_has_every_section_and_loads_nothing(tmp_path: Path) -> None:
    _, path = write_report(full_report(), tmp_path)
    page = path.read_text(encoding="utf-8")
    for name in ("verdict", "curves", "memory", "quality", "plan", "recipe", "machine", "how"):
        assert f'<section id="{name}">' in page
    for text in (*LABELS.values(), "After conversion", "99.50", "70.25", "layer 2 stood down", "3 sites: layers.0.mlp"):
        assert text in page
    assert page.count("<svg ") == 3 and "<img" not in page
    assert not re.search(r"https?:|//|@import|<script|<link|url\((?!#)", re.sub(r"base64,[^\"]+", "", page))
    assert "A model &lt;b&gt;&amp; text" in page and "m&lt;script&gt;" in page


def test_the_json_round_trips_and_holds_plain_values(tmp_path: Path) -> None:
    report = full_report()
    report["runs"]["sparse"]["steps"][0]["loss"] = torch.tensor(3.5)
    report["runs"]["sparse"]["saved_by_layer"] = {0: {"ffn": 5}}
    path, _ = write_report(report, tmp_path / "new" / "folder")
    loaded = load_report(path)
    assert loaded["runs"]["sparse"]["steps"][0]["loss"] == 3.5
    assert loaded["runs"]["sparse"]["saved_by_layer"] == {"0": {"ffn": 5}}
    assert render_text(loaded) == render_text(report)
    again, _ = write_report(loaded, tmp_path)
    assert json.loads(again.read_text()) == json.loads(path.read_text())


def test_one_run_alone_is_reported_without_a_comparison(tmp_path: Path) -> None:
    report = build_report(title="t", runs={"sparse": make_run(0.5, 3.0)})
    assert report["judgements"] == [] and report["advice"] == ""
    assert report["headline"].startswith("One sparse run: held-out loss 4.000 → 3.000 in 40 steps. Nothing is compared")
    dense = build_report(title="t", runs={"dense": make_run(0.5, 3.0)})
    assert dense["headline"] == "One dense run: held-out loss 4.000 → 3.000 in 40 steps."
    page = write_report(report, tmp_path)[1].read_text()
    assert 'id="verdict"' in page and 'id="curves"' in page and "sparse wins" not in page
    lines = render_text(report)
    assert lines[1] == "  sparse: 40 steps, 0.5 s a step, 1,024 tokens/s, 100 MiB of saved activations, peak 900 MiB"
    assert lines[2] == "  sparse perplexity: dense 54.60, after training 20.09"


def test_bare_runs_still_make_a_page(tmp_path: Path) -> None:
    step: Any = {"step": 1, "loss": 2.0, "step_time_s": 0.1, "tokens": 8, "wall_s": 0.1}
    for runs in ({"dense": {"steps": []}}, {"dense": {"steps": [step]}, "sparse": {"steps": [step]}}):
        report = build_report(title="t", runs=copy.deepcopy(runs))  # type: ignore[arg-type]
        assert write_report(report, tmp_path)[1].read_text().endswith("</html>\n")
        assert render_text(report)
    assert set(winners(report)) == {"time_per_step", "loss_at_equal_steps"}


def test_a_crash_while_writing_leaves_the_old_report_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, page = write_report(full_report(), tmp_path)
    before = path.read_bytes(), page.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(report_module.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(build_report(title="new", runs={"dense": make_run(1.0, 3.0)}), tmp_path)
    assert (path.read_bytes(), page.read_bytes()) == before
    assert sorted(os.listdir(tmp_path)) == ["report.html", "report.json"]


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'dense', 'sparse'"):
        build_report(title="t", runs={"fast": make_run(1.0, 3.0)})
    with pytest.raises(ValueError, match="Give one or both"):
        build_report(title="t", runs={})
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_report(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="layout 99"):
        load_report(tmp_path / "b.json")


def test_a_run_whose_model_grew_is_not_called_sparse(tmp_path: Path) -> None:
    size: Any = {"parameters": 10, "layers": 1, "width": 4, "flops_per_token": 60}
    runs = {"dense": make_run(0.5, 3.0), "sparse": make_run(0.4, 3.1)}
    runs["sparse"]["stages"] = [{**size, "name": "whole", "from_step": 0, "to_step": 40}]
    runs["dense"]["stages"] = []
    report = build_report(title="t", runs=runs)
    text = "\n".join(render_text(report))
    assert "Grown wins on time per step" in text and "grown: 40 steps" in text
    assert not re.search(r"\bsparse|sparsity\b", text, re.IGNORECASE)
    page = write_report(report, tmp_path)[1].read_text()
    shown = re.findall(r">([^<]+)<", page.partition("How this was measured")[0].partition("<body")[2])
    assert not [words for words in shown if re.search(r"\b[Ss]parse\b", words)]
