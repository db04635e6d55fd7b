"""SparseDM in whole runs of a language model: all weights train, resuming, a teacher, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsetrain.core.anatomy import describe, submodule
from sparsetrain.hf.model.io import export, load
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.recipes.finetune import Recipe
from tests.hf import runs
from tests.hf.test_checkpoint import losses, resume, stopped
from tests.hf.test_pst_training import assert_same_files

MASKED = {"method": "sparsedm"}
STAGED = {"method": "sparsedm", "plan": ["2:6:8", "7:2:4"], "freeze_mask_after": 9}


def recipe(folder: Path, **changes: Any) -> Recipe:
    """Of twelve steps; neither `lora_r` nor `deploy` is given."""
    values = runs.recipe(folder).model_dump(exclude={"lora_r", "deploy", "methods"})
    return Recipe.from_values({**values, "methods": [MASKED], "steps": 12, **changes})


@pytest.mark.parametrize("method", [MASKED, STAGED], ids=["masked", "staged"])
def test_a_run_goes_on_as_if_never_stopped(tmp_path: Path, method: dict[str, Any]) -> None:
    """Takes seconds: three runs, one of them stopped."""
    asked = recipe(tmp_path, methods=[method], output=str(tmp_path / "whole"))
    assert (asked.lora_r, asked.deploy, asked.trains_all) == (0, "sparse", True)
    whole = finetune(asked, write=False)
    perplexity = whole.run["perplexity"]
    assert perplexity["after_training"] < perplexity["dense"]
    parts = recipe(tmp_path, methods=[method], output=str(tmp_path / "parts"))
    stopped(parts, 7)
    again = resume(parts)
    assert again.resumed_from == 6 and losses(again) == losses(whole)
    assert_same_files(whole, again)


def test_export_of_a_run_loads_plainly_with_exact_zeros(tmp_path: Path) -> None:
    finetune(recipe(tmp_path), write=False)
    ids = torch.arange(4, 18)[None]
    with torch.no_grad():
        expected = load(tmp_path / "out").model(input_ids=ids).logits
        export(tmp_path / "out", tmp_path / "zeros", format="nm")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "zeros").float()
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=2e-2, atol=2e-2)
    for site in describe(plain).linears:
        weight: Any = submodule(plain, site.name).weight
        assert ((weight != 0).unflatten(1, (-1, 4)).sum(2) <= 2).all()
    with pytest.raises(ValueError, match="cannot be merged"):
        export(tmp_path / "out", tmp_path / "dense", format="dense")


def test_a_teacher_of_tokens_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="teacher_weight=0.1 compares predictions, and task=lm"):
        finetune(recipe(tmp_path, methods=[{**MASKED, "teacher_weight": 0.1}]), write=False)
