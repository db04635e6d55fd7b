"""The examples run as they are written, on tiny data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sparsetrain.hf.recipe import Recipe
from tests.cli.conftest import Call, save_llama

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_examples_are_short() -> None:
    assert all(len(path.read_text().splitlines()) <= 80 for path in EXAMPLES.iterdir() if path.is_file())


@pytest.mark.slow
def test_the_python_example(llama: Path, text: Path, tmp_path: Path) -> None:
    flags = ["--model", llama, "--data", text, "--seq-len", 64, "--steps", 2, "--output", tmp_path / "run"]
    command = [str(part) for part in (sys.executable, EXAMPLES / "finetune.py", *flags)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    values = [float(line.rpartition(": ")[2]) for line in done.stdout.splitlines() if line.startswith("perplexity")]
    assert len(values) == 4 and values[2] == pytest.approx(values[3], rel=1e-2)  # the saved adapter is the trained one


def test_the_demo_s_recipe(call: Call, text: Path, tmp_path: Path) -> None:
    llama = save_llama(tmp_path / "model", num_hidden_layers=30)  # the recipe names layers
    values = yaml.safe_load((EXAMPLES / "demo.yaml").read_text())
    recipe = Recipe.from_yaml(EXAMPLES / "demo.yaml")
    assert recipe.compare == "dense" and recipe.seq_len >= 1024 and recipe.methods
    assert values["model"] == "smollm2-135m" and values["data"] == "python-stdlib"
    tiny = ("--model", llama, "--data", text, "--seq-len", 64, "--output", tmp_path / "run")
    assert call("finetune", "--recipe", EXAMPLES / "demo.yaml", *tiny, "--dry-run").code == 0
