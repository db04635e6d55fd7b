"""A model of the hub at a revision: trained, saved and loaded again, from the hub's cache alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import constants

from sparsetrain.hf.model.io import load
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.recipes.finetune import Recipe
from tests.hf import runs
from tests.hf.test_checkpoint import resume, stopped

NAME = "people/tiny"
COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with two revisions of a model, whose weights differ, and no network."""
    root = tmp_path / "hub" / "models--people--tiny"
    for i, (name, commit) in enumerate(COMMITS.items()):
        folder = runs.llama(root / "snapshots" / commit, hidden_size=32 + 16 * i, head_dim=8)
        blobs = root / "blobs"
        blobs.mkdir(exist_ok=True)
        for file in folder.iterdir():  # as the hub's client does: links to what is stored once
            shutil.move(file, blobs / f"{commit}-{file.name}")
            file.symlink_to(blobs / f"{commit}-{file.name}")
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / name).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return root


def recipe(folder: Path, **changes: object) -> Recipe:
    runs.recipe(folder)
    given = {"output": str(folder / "out"), "data": str(folder / "text"), "seq_len": 64, "steps": 2, "lora_r": 4}
    given |= {"device": "cpu", "dtype": "fp32", "methods": [], "save_every": 0, "eval_tokens": 128, "model": NAME}
    return Recipe.from_values(given | changes)


def test_a_run_is_of_its_revision(tmp_path: Path, cache: Path) -> None:
    asked = recipe(tmp_path, model_revision="v1")
    finetune(asked, write=False)
    written = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == (NAME, "v1")
    loaded = load(tmp_path / "out")
    assert loaded.model.config.hidden_size == 48
    assert torch.isfinite(loaded.model(torch.tensor([[4, 5, 6]])).logits).all()
    assert asked.fingerprint() != recipe(tmp_path).fingerprint()
    (tmp_path / "out/adapter/sparsity_config.json").unlink()  # as another tool would have written it
    assert load(tmp_path / "out/adapter").model.config.hidden_size == 48


def test_a_revision_that_is_not_there_or_of_no_hub_is_told(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ValueError, match="at revision v2: model 'people/tiny'"):
        finetune(recipe(tmp_path, model_revision="v2"))
    with pytest.raises(ValueError, match="is on this machine"):
        finetune(recipe(tmp_path, model_revision="v1", model=str(tmp_path / "model")))
    assert not (tmp_path / "out").exists()


def test_rows_are_of_a_revision_of_their_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        f"v{n}": datasets.Dataset.from_dict({"text": [f"{runs.WORDS[i]} {runs.WORDS[n]} " * 40 for i in range(12)]})
        for n in (1, 2)
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, *, split, revision: table[revision])
    asked = runs.recipe(tmp_path, data="people/texts", dataset_revision="v1", holdout="documents")
    stopped(asked, 3)
    resume(asked)
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert "`people/texts` at revision `v1`" in card and "dataset_revision: v1" in card
    stale = asked.model_copy(update={"output": str(tmp_path / "stale")})
    stopped(stale, 3)
    with pytest.raises(ValueError, match="dataset_revision: 'v1' there, 'v2' here"):
        finetune(stale.model_copy(update={"dataset_revision": "v2", "resume": True}), write=False)
    with pytest.raises(ValueError, match=r"dataset_revision=v1: .*text is on this machine"):
        finetune(runs.recipe(tmp_path, dataset_revision="v1", output=str(tmp_path / "other")), write=False)
    assert "dataset_revision" not in runs.recipe(tmp_path).training_values()
