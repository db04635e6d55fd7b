"""SparseDM in whole runs of a language model and of a diffusion model: resuming, teacher, samples, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from PIL import Image
from transformers import AutoModelForCausalLM

from sparsetrain.core.anatomy import describe, submodule
from sparsetrain.hf.model.io import export, load
from sparsetrain.hf.model.sampling import sample
from sparsetrain.hf.train import image_quality
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.hf.train.pretrain import pretrain
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.recipes.pretrain import PretrainRecipe
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
    run: Any = whole.run
    perplexity = run["perplexity"]
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
    with pytest.raises(ValueError, match=r"teacher_weight=0\.1 compares predictions, and task=lm"):
        finetune(recipe(tmp_path, methods=[{**MASKED, "teacher_weight": 0.1}]), write=False)


def pictures(folder: Path) -> Path:
    """Bright and dark pictures of 8 x 8, 20 of each."""
    draw = np.random.default_rng(0)
    for name, level in (("bright", 180), ("dark", 20)):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            pixels = draw.integers(level, level + 60, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_a_diffusion_model_is_trained_on_masked_resumed_sampled_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Takes seconds: a dense run to start from, then three masked ones, of a DiT of two blocks."""
    monkeypatch.setattr(image_quality, "GRID", 2)
    monkeypatch.setattr(image_quality, "SECONDS", 0.0)  # FID needs a classifier and 512 images
    data, sizes = str(pictures(tmp_path / "data")), {"num_layers": 2, "attention_head_dim": 8, "sample_size": 8}
    common = {"task": "diffusion", "data": data, "save_every": 3, "batch_size": 4, "dtype": "fp32"}
    dense = {**common, "model": "dit-nano", "set": sizes, "steps": 4, "output": str(tmp_path / "dense")}
    start = pretrain(PretrainRecipe.from_values(dense), write=False)
    staged = {**MASKED, "plan": ["2:3:4", "4:2:4"], "freeze_mask_after": 6}
    asked = {**common, "model": str(start.saved), "methods": [staged], "steps": 8}
    whole = finetune(Recipe.from_values({**asked, "output": str(tmp_path / "whole")}), write=False)
    parts = Recipe.from_values({**asked, "output": str(tmp_path / "parts")})
    stopped(parts, 5)
    again = resume(parts)
    assert again.resumed_from == 3 and losses(again) == losses(whole)
    assert_same_files(whole, again)  # the average of the weights is what is saved
    found = load(whole.saved)
    assert found.handle is not None
    assert {str(site.ratio) for site in found.handle.sites("sparsedm").values()} == {"2:4"}
    images = sample(found.model, 4, steps=3)
    export(whole.saved, tmp_path / "zeros", format="nm")
    plain = DiTTransformer2DModel.from_pretrained(tmp_path / "zeros")
    for site in describe(plain).linears:
        weight: Any = submodule(plain, site.name).weight
        assert site.role == "other" or ((weight != 0).unflatten(1, (-1, 4)).sum(2) <= 2).all()
    assert np.array_equal(sample(load(tmp_path / "zeros").model, 4, steps=3), images)
