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

MIB = 2**20


def make_run(
    step_s: float, final: float, *, steps: int = 40, saved: int = 100, peak: int = 900, setup: float = 0.0
) -> Run:
    """Loss falls in a straight line from 4 to `final`; held-out every 10 steps."""
    losses = [4 + (final - 4) * i / steps for i in range(steps + 1)]
    run: Run = {
        "steps": [
            {"step": i, "loss": losses[i], "step_time_s": step_s, "tokens": 512, "wall_s": step_s * i}
            for i in range(1, steps + 1)
        ],
        "evals": [
            {"step": i, "wall_s": step_s * i, "loss": losses[i], "perplexity": math.exp(losses[i])}
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
    assert texts[0] == "A sparse step takes 0.5 s, a dense step 1 s: 2.00× faster."
    # after 20 s sparse is done and dense is half way between 4 and 3
    assert texts[2] == "Held-out loss after 20 s: 3.000 sparse, 3.500 dense (-0.500)."
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
    assert report["advice"].endswith("train dense.")


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
        "The dense run was over (40 s) before the sparse run had its first loss (60 s, 60 s of set-up included)."
    )


def test_interleaved_times_overrule_times_of_separate_runs() -> None:
    runs = {"dense": make_run(1.0, 3.0), "sparse": make_run(0.5, 3.0)}
    timing = {"median": 0.9, "q1": 0.85, "q3": 0.95, "verdict": "loss"}
    report = build_report(title="t", runs=runs, timing=timing)
    assert report["judgements"][0]["winner"] == "dense"
    assert report["judgements"][0]["text"].startswith("1.11× slower in steps timed alternately")
    assert report["judgements"][0]["ratio"] == pytest.approx(1 / 0.9)


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
    assert judgement["text"] == "Accuracy after training: 86.0% sparse, 81.0% dense."


def test_the_page_has_every_section_and_loads_nothing(tmp_path: Path) -> None:
    _, path = write_report(full_report(), tmp_path)
    page = path.read_text(encoding="utf-8")
    for name in ("verdict", "curves", "memory", "quality", "plan", "recipe", "machine", "how"):
        assert f'<section id="{name}">' in page
    for text in (*LABELS.values(), "After conversion", "99.50", "70.25", "layer 2 stood down", "3 sites: layers.0.mlp"):
        assert text in page
    assert page.count('src="data:image/png;base64,iVBOR') == 5
    assert not re.search(r"https?:|//|@import|<script|<link|url\(", re.sub(r"base64,[^\"]+", "", page))
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
    assert set(winners(report)) == {"time_per_step", "loss_at_equal_steps", "loss_at_equal_time"}


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
