"""The arms of the benchmark of SaRA: PEFT's SHiRA in LoRA's place, and as many numbers in each."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.methods.sara import BENCHMARKS, DATA, shira, train
from bench.methods.super_tuning import super_tuning
from bench.runner import asked_of, cells_of
from sparsetrain.core.anatomy import describe
from sparsetrain.hf.model.io import load
from sparsetrain.hf.train.finetune import finetune
from tests.hf import runs


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # PEFT's, of its weight's sparse tensor
def test_shira_goes_through_the_same_run(tmp_path: Path) -> None:
    with shira():
        found = finetune(runs.recipe(tmp_path, deploy="dense", lr=0.05, save_every=0), write=False)
    assert found.run["perplexity"]["after_training"] < found.run["perplexity"]["dense"]
    lora = finetune(
        runs.recipe(tmp_path, deploy="dense", steps=1, save_every=0, output=str(tmp_path / "b")), write=False
    )
    assert found.trainable_parameters == lora.trainable_parameters


@pytest.mark.parametrize("select_top", [True, False])
def test_super_tuning_goes_through_the_same_run(select_top: bool, tmp_path: Path) -> None:
    asked = runs.recipe(tmp_path, deploy="dense", lr=0.05, save_every=0, steps=6)
    with super_tuning(select_top):
        found = finetune(asked, write=False)
    assert found.run["perplexity"]["after_training"] < found.run["perplexity"]["dense"]
    entries = sum(
        site.in_features * site.out_features for site in describe(load(str(tmp_path / "model")).model).linears
    )
    assert found.trainable_parameters == pytest.approx(0.1 * entries, rel=0.01)


def test_a_cell_is_a_run(tmp_path: Path) -> None:
    runs.recipe(tmp_path)  # makes model and text
    values = {"model": str(tmp_path / "model"), "data": str(tmp_path / "text"), "seq_len": 64, "steps": 4}
    found = train({**values, "methods": ["sara"], "lr": 1e-2, "save_every": 0, "dtype": "fp32"}, False, 1)
    assert (
        found["lr"] <= 1e-2 and found["trained"] > 0 and found["notes"] and found["static"]["optimizer_trainable"] > 0
    )


def test_three_seeds_of_four_arms_on_two_data_sets() -> None:
    keys = [cell.key for cell in cells_of(BENCHMARKS[0], asked_of(BENCHMARKS[0]))]
    assert len(keys) == len(set(keys))
    for data in DATA:
        for arm in ("sara", "lora", "full", "shira"):
            assert {f"{data} {arm} {seed}" for seed in range(3)} <= set(keys)
