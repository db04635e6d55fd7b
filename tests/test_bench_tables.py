"""Tables of grids that are measured in part: what is there is shown, and nothing else is claimed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.runner import benchmarks
from bench.tables import CONCLUSIONS, TABLES, WITHOUT_TABLE, growth, linears, pictures


def of(cells: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {"settings": settings, "results": cells}


def run(loss: float, **more: Any) -> dict[str, Any]:
    return {"loss": loss, "step_s": 1.0, "lr": 1e-3, "trained": 100, "steps": 10, "accuracy": None, **more}


def test_sara_beside_lora_by_seed() -> None:
    cells = {"python-stdlib sara 0": run(2.0), "python-stdlib lora 0": run(1.9), "python-stdlib sara 1": run(2.2)}
    cells["python-stdlib lora 1"] = run(2.0)
    lines = linears.sara(of(cells, steps=10))
    assert "| sara | 100 | 1.0e-03 | 2 | 2.100 ± 0.100 | +0.150 ± 0.050 | 1.00 |" in lines
    said = linears.conclude_sara({"sara": of(cells)})
    assert said.endswith("python-stdlib: +0.150 ± 0.050 (lora).")
    alone = linears.conclude_sara({"sara": of({"python-stdlib sara 0": run(2.0)})})  # beside nothing yet
    assert "Not measured" in alone and "Not measured" in linears.conclude_sara({})


def test_pst_s_trained_numbers_beside_movement_s() -> None:
    cells = {"minilm 0.1 pst 0": run(0.4, accuracy=0.8, zero_ratio=0.9, trained=2)}
    cells["minilm 0.1 movement 0"] = run(0.5, accuracy=0.75, zero_ratio=0.9, trained=100)
    cells["minilm pst rate 0.001"] = run(0.1)  # a trial, not a run
    lines = linears.pst(of(cells))
    assert "| 0.1 | pst | 1 | 0.800 | – | 90.0% | 2 | 2.0% |" in lines
    assert "| 0.1 | movement | 1 | 0.750 | -0.050 | 90.0% | 100 | 100.0% |" in lines
    assert "accuracy: – (magnitude), +0.050 (movement)" in linears.conclude_pst({"pst": of(cells)})


def test_monarch_beside_dense_at_its_steps() -> None:
    cells = {"gpt dense steps 0": run(2.0, parameters=9), "gpt monarch time 0": run(1.9, parameters=5, steps=20)}
    cells["gpt monarch step"] = {"median": 2.0}
    lines = linears.monarch(of(cells))
    assert lines[0] == "**gpt**; a dense step / the arm's: monarch 2.00"
    assert "| monarch, equal time | 20 | 1 | 5 | 1.900 | -0.100 |" in lines
    assert "gpt at equal time: -0.100 (monarch)" in linears.conclude_monarch({"monarch_quality": of(cells)})


def test_a_projected_minilm_before_and_after_its_epoch() -> None:
    cell = {"dense": 0.8, "monarch_dense": 0.8, "monarch_after_conversion": 0.6, "monarch_after_training": 0.75}
    lines = linears.monarch(of({"minilm d2s 0": {**cell, "dense_after_training": 0.82}}))
    assert "| projected to half of its weights | 1 | 0.600 |" in lines
    assert "| after one more epoch | 1 | 0.750 |" in lines


def test_a_table_says_how_much_of_its_grid_is_measured() -> None:
    """All tables are for the arms that are there: an arm without a cell would be missed by no reader."""
    found = of({"gpt2 ordinary 1 0": run(2.0), "gpt2 grown 0.65 0": run(1.9)}, steps=1000, shares=[0.65, 1.0])
    part = report.absent("masked_growth", found)
    assert part.startswith("2 of ") and part.endswith(" cells measured")
    assert report.with_origin(["| a |"], found, part)[-1].startswith(f"{part}. CPU, commit")
    assert report.absent("no such benchmark", found) == ""
    assert report.with_origin(["| a |"], found)[-1] == "CPU, commit not recorded."


def test_a_loss_that_is_not_reached_is_said() -> None:
    cells = {"ordinary 0": run(2.0, flops=10), "ordinary 1": run(2.0, flops=10)}
    ratios = {"flops_ratio": 0.8, "cpu_s_ratio": 0.9, "loss_over_ordinary": -0.1}
    missed = {"flops_ratio": None, "cpu_s_ratio": None, "loss_over_ordinary": 0.1}
    cells |= {"v-cycle 0": run(1.9, flops=9, switch_s=0.3, time_s=100.0, **ratios)}
    cells |= {"v-cycle 1": run(2.1, flops=9, switch_s=0.1, time_s=100.0, **missed)}
    cells["small alone 0"] = run(2.5, flops=5, **missed)
    lines = growth.multi_level(of(cells))
    assert "| v-cycle | 2 | 2.000 ± 0.100 | +0.000 ± 0.100 | 0.90 | 0.80 (1 not) | 0.90 (1 not) | 0.20% |" in lines
    assert lines[-1].endswith("| not reached | not reached | – |")
    assert "FLOPs 0.80 (1 not)" in growth.conclude_growth({"multi_level_gpt": of(cells)})


def test_growth_at_shares_of_the_ordinary_run() -> None:
    told = {
        "loss_less_ordinary": -0.05,
        "of_its": {"cpu_s": 0.6},
        "reached_at": {"cpu_s": 0.5, "flops": 0.55},
        "growing_share": 0.01,
    }
    cells = {"gpt2 ordinary 1 0": run(2.0), "gpt2 grown 0.65 0": run(1.95, **told)}
    lines = growth.masked_growth(of(cells))
    assert "| grown | 0.65 | 1 | 1.950 | -0.050 | 0.55 | 0.60 | 0.50 | 1.0% |" in lines
    other = {"machine": {"cpu": "another"}, "cells": ["gpt2 ordinary 1 0"]}
    lines = growth.masked_growth(of(cells) | {"earlier": [other]})
    assert "| grown | 0.65 | 1 | 1.950 | -0.050 | 0.55 | – | – | 1.0% |" in lines
    assert "gpt2 -0.050 at 0.65 of its FLOPs" in growth.conclude_growth({"masked_growth": of(cells)})


def test_sparsedm_beside_dense_of_as_many_steps() -> None:
    cells = {"start 0": {"noise_loss": 1.0}, "dense 0": run(0.0, fid=10.0, kid=0.1, noise_loss=0.4, macs_saved=0.0)}
    cells["teacher 0"] = run(0.0, fid=11.0, kid=0.2, noise_loss=0.4, macs_saved=0.46)
    lines = pictures.sparsedm(of(cells))
    assert lines[-1] == "| teacher | 1 | 11.000 | +10.0 % | 0.200 | 0.400 | 46.0 % | 1.00 |" and len(lines) == 4
    assert "+1.000 (teacher)" in pictures.conclude_sparsedm({"sparsedm": of(cells)})


def test_sparsedm_s_export_and_sheet_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = {"dense 0": run(0.0, fid=10.0, kid=0.1, noise_loss=0.4, macs_saved=0.0)}
    cells["export"] = {
        "largest_difference": 2e-7,
        "exported_of_dense": 1.01,
        "masked_of_dense": 1.5,
        "packed": "no GPU.",
    }
    cells["pictures"] = {"sheet": str(tmp_path / "arms.png"), "rows": ["dense", "teacher"]}
    monkeypatch.setattr(pictures, "SHEET", tmp_path / "sparsedm.png")
    lines = pictures.sparsedm(of(cells))
    assert lines[-1].endswith(
        "differ by 2e-07 at most; a forward takes 1.01 of the dense model's time (1.50 while masks are chosen). "
        "2:4 packing: no GPU."
    )
    (tmp_path / "sparsedm.json").write_text(json.dumps(of(cells)))
    (tmp_path / "arms.png").write_bytes(b"png")
    for name, value in {"RESULTS": tmp_path, "SHEET": pictures.SHEET}.items():
        monkeypatch.setattr(report, name, value)
    report._take_sheet()
    assert pictures.SHEET.read_bytes() == b"png"
    assert "![Samples of every arm, a row each](../pictures/sparsedm.png)" in pictures.sparsedm(of(cells))


def test_sara_on_a_diffusion_model_by_size() -> None:
    told = {f"{kind}_{part}": 1.0 for kind in ("loss", "fid", "kid") for part in ("new", "old")}
    cells: dict[str, Any] = {"pretrained 0": told}
    arms = ("full all 0", "sara small 0", "sara small 1", "lora small 0")
    cells |= {key: {"trained": 1234, **told} for key in arms}
    cells["lora small 0"] = cells["lora small 0"] | {"fid_old": 3.0}
    lines = pictures.sara_diffusion(of(cells))
    assert lines[0] == "Before fine-tuning: loss, old: 1.000; fid, old: 1.000; kid, old: 1.000."
    assert lines[2] == "**small**" and "| sara | 2 | 1,234 |" + " 1.000 ± 0.000 |" * 6 + " 1.000 |" in lines
    assert "| lora | 1 | 1,234 | 1.000 | 1.000 | 1.000 | 3.000 | 1.000 | 1.000 | 0.000 |" in lines
    assert lines[-2].startswith("| full | 1 |") and len(lines[-2].split("|")) == len(lines[4].split("|"))


def test_every_benchmark_has_a_table_or_a_reason() -> None:
    found = benchmarks().keys()
    assert not TABLES.keys() & WITHOUT_TABLE.keys() and all(WITHOUT_TABLE.values())
    assert found == TABLES.keys() | WITHOUT_TABLE.keys()


def test_concepts_by_data() -> None:
    cells = {"reviews probe 0": {"accuracy": 0.7}, "reviews probe 1": {"accuracy": 0.8}}
    cells["reviews l1 0"] = {"accuracy": 0.75, "zero_weights": 0.96, "zero_activations": 0.0, "concepts_that_add": 50.0}
    lines = pictures.concepts(of(cells))
    assert "| probe | 2 | 75.0 ± 5.0 % | – | – | – | – |" in lines
    assert "| l1 | 1 | 75.0 % | 96.0 % | 0.0 % | 50.0 | – |" in lines
    assert "reviews: 75.0 ± 5.0 % (probe), 75.0 % (l1)" in pictures.conclude_concepts({"concept_bottleneck": of(cells)})


def test_every_page_can_say_that_nothing_is_measured() -> None:
    for name in ("sara", "pst", "monarch", "growth", "deploy", "sparsedm", "concept_bottleneck"):
        assert CONCLUSIONS[name]({}).startswith("Not measured yet")
