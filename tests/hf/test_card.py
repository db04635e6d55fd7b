"""The README.md of what a run leaves: it loads by its own words, and names no place on this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sparsetrain.hf.model.io import load
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.runs.card import public_name
from tests.hf.runs import ROUTED, recipe


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("secret-place")
    finetune(recipe(root, steps=2))
    return root


def card_at(folder: Path) -> tuple[dict[str, Any], str]:
    head, _, body = (folder / "README.md").read_text().removeprefix("---\n").partition("---\n")
    return yaml.safe_load(head), body


def test_the_card_says_what_was_done_and_names_no_place(tuned: Path):
    head, body = card_at(tuned / "out" / "adapter")
    assert head["library_name"] == "peft" and "lora" in head["tags"] and "base_model" not in head
    assert "secret-place" not in body and str(tuned) not in body and "`model` (LlamaForCausalLM)" in body
    assert re.search(r"\| before training \| [\d.,]+ \|\n\| after training \| [\d.,]+ \|", body)
    assert re.search(r"Hash of the training rows .*: `[0-9a-f]{16}`", body)
    values = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", body, re.DOTALL)[0])
    assert values["steps"] == 2 and values["model"] == "model" and "output" not in values
    assert not list(tuned.glob("out/checkpoint-*/README.md")) and list(tuned.glob("out/checkpoint-*/manifest.json"))


def test_what_the_card_says_loads_the_adapter(tuned: Path):
    folder = tuned / "out" / "adapter"
    plain, ours = re.findall(r"```python\n(.*?)```", card_at(folder)[1], re.DOTALL)
    made: dict[str, Any] = {}
    for code in (plain, ours):
        exec(code.replace("FOLDER", str(folder)).replace("BASE", str(tuned / "model")), made)
    ids = torch.arange(4, 14)[None]
    with torch.no_grad():
        torch.testing.assert_close(made["model"].eval()(ids).logits, made["loaded"].model(ids).logits)


def test_a_model_that_runs_sparse_is_not_offered_to_others(tmp_path: Path):
    finetune(recipe(tmp_path, steps=2, methods=[ROUTED]))
    head, body = card_at(tmp_path / "out" / "adapter")
    assert "routed_ffn" in head["tags"] and "after conversion" in body
    assert "plain transformers and PEFT do not compute" in body and "PeftModel" not in body
    assert load(tmp_path / "out").handle is not None


@pytest.mark.parametrize(
    ("source", "name"),
    [("/home/me/data.jsonl", "`data.jsonl`"), ("~/notes/*.txt", "`*.txt`"), ("./x", "`x`"), ("org/name", "`org/name`"),
     ("/", "`a folder`")],
)  # fmt: skip
def test_names_that_others_may_read(source: str, name: str):
    assert public_name(source) == name
