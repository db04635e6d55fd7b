"""A model that brings its own classes: refused in a line, or, with the user's word at every command, trained dense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.dynamic_module_utils as dynamic
import yaml

from sparsetrain.cli import run
from sparsetrain.hf.model.io import load
from tests.hf import runs
from tests.hf.own_code import own_model
from tests.hf.test_checkpoint import stopped

TRUST = "--trust-remote-code"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the model and text; transformers keeps its copy of the code in there, too."""
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    own_model(tmp_path / "model", tmp_path / "ran")
    runs.text(tmp_path / "text")
    return tmp_path


def ran(place: Path) -> bool:
    """Has the model's code run since this was asked last?"""
    found = (place / "ran").exists()
    (place / "ran").unlink(missing_ok=True)
    return found


def arguments(place: Path, *more: str) -> list[str]:
    asked = {"model": place / "model", "data": place / "text", "output": place / "out", "seq_len": 64, "steps": 4}
    asked |= {"batch_size": 2, "eval_tokens": 256, "device": "cpu", "save_every": 2, "lr": 0.01}
    pairs = [word for key, value in asked.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    return ["finetune", *pairs, "--preset", "dense", *more]


def test_code_of_a_model_runs_where_the_flag_is_given_and_nowhere_else(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments(place)) != 0 and not ran(place)
    assert (
        "needs Python code that comes with it, which is run with --trust-remote-code alone" in capsys.readouterr().err
    )
    assert run(arguments(place, TRUST)) == 0 and ran(place)
    said = capsys.readouterr()
    assert "trust_remote_code: Python code that came with" in said.out + said.err
    assert "trust_remote_code: true" in (place / "out" / "adapter" / "README.md").read_text()
    assert yaml.safe_load((place / "out" / "recipe.yaml").read_text())["trust_remote_code"] is True
    trained = json.loads((place / "out" / "result.json").read_text())["run"]["evals"][-1]["loss"]

    out = str(place / "out")
    for command in (["eval", out], ["chat", out, "--prompt", "red"], ["export", out, "--output", str(place / "e")]):
        assert run(command) != 0 and not ran(place), command
        assert TRUST in capsys.readouterr().err
    assert run(["eval", out, TRUST, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(trained, rel=1e-5)
    assert run(["chat", out, TRUST, "--prompt", "red sun", "--max-new-tokens", "4", "--device", "cpu"]) == 0
    assert run(["export", out, TRUST, "--output", str(place / "merged")]) == 0
    tokens = torch.arange(8)[None]
    one = load(place / "out", trust_remote_code=True).model(tokens).logits
    merged = load(place / "merged", trust_remote_code=True).model(tokens).logits
    assert (merged - one).abs().max() < 2e-6 * one.abs().max()


def test_a_recipe_file_does_not_decide_that_code_runs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe: Any = runs.recipe(place, trust_remote_code=True, deploy="dense")
    stopped(recipe, 3)
    ran(place)
    file = str(place / "run.yaml")
    recipe.to_yaml(file)
    assert run(["finetune", "--recipe", file, "--resume"]) != 0 and not ran(place)
    assert "and no file decides that. Read that code, and give --trust-remote-code too" in capsys.readouterr().err
    assert run(["finetune", "--recipe", file, "--resume", TRUST]) == 0


def test_methods_are_refused_and_plain_models_take_the_flag(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments(place, TRUST)
    given[given.index("--preset") + 1] = "tokens"
    assert run(given) != 0
    assert "is built by code of its own, in which token_selection knows no sites" in capsys.readouterr().err
    runs.llama(place / "llama")
    plain = arguments(place, TRUST, "--dry-run")
    plain[plain.index("--model") + 1] = str(place / "llama")
    assert run(plain) == 0 and "needs no code of its own, and none ran" in "".join(capsys.readouterr())
