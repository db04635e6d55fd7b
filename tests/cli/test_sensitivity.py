"""`sparsetrain sensitivity`: a row a layer, a recipe within its budget that finetune takes, and clear refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsetrain.recipes.finetune import Recipe
from tests.cli.conftest import Call, save_llama, write_text

METHOD = "routed_ffn:num_blocks=4,num_active=2,shared_ratio=0.25,partition=clustered,compensation_rank=4"
SHORT = ("--seq-len", 32, "--eval-tokens", 64, "--calibration-tokens", 512, "--steps", 2)


@pytest.fixture
def place(tmp_path: Path) -> tuple[object, ...]:
    model, data = save_llama(tmp_path / "model"), write_text(tmp_path / "data.txt", 4000)
    return ("--model", model, "--data", data, *SHORT)


def test_layers_within_a_budget_become_a_recipe(call: Call, place: tuple[object, ...], tmp_path: Path) -> None:
    written = tmp_path / "chosen.yaml"
    found = call("sensitivity", *place, "--method", METHOD, "--budget", 50, "--write", written, "--json")
    assert found.code == 0, found.err
    rows = found.json["rows"]
    assert [row["layer"] for row in rows] == [0, 1]
    assert all(row["kept"] and row["mflop_saved"] > 0 for row in rows)
    assert found.json["predicted_ratio"] >= 1
    recipe = Recipe.from_yaml(written)
    assert recipe.configs[0].layers == (0, 1) and recipe.configs[0].from_depth == 0
    assert call("finetune", "--recipe", written, "--output", tmp_path / "run", "--dry-run").code == 0


def test_without_a_budget_it_only_measures(call: Call, place: tuple[object, ...]) -> None:
    found = call("sensitivity", *place, "--method", METHOD)
    assert found.code == 0, found.err
    assert "routed_ffn" in found.out and "kept" not in found.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", 0.9), "allows no loss"),
        (("--write", "x.yaml"), "--budget is not given"),
        (("--preset", "dense"), "no method"),
    ],
)
def test_bad_requests_are_refused(
    call: Call, place: tuple[object, ...], arguments: tuple[object, ...], message: str
) -> None:
    found = call("sensitivity", *place, *arguments)
    assert found.code != 0
    assert message in found.err
