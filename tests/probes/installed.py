"""What `test_probes` runs where the probes are installed, beside the contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import sparsetrain
from sparsetrain.core.config import MethodConfig, registered_methods
from sparsetrain.hf.model.io import load
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.recipes.pretrain import PretrainRecipe
from tests.families import FAMILIES
from tests.hf import runs

TOYS = {"toy_concepts", "toy_convolution_mask", "toy_entries", "toy_low_rank", "toy_widening"}


def test_they_are_known_wherever_ours_are() -> None:
    assert {name for name in registered_methods() if name.startswith("toy_")} == TOYS
    asked = PretrainRecipe.from_values({"model": "gpt2-nano", "data": "d", "methods": ["toy_low_rank:rank=4"]})
    config: Any = asked.configs[0]
    assert config.rank == 4


def test_only_chosen_entries_move_under_adamw_with_decay() -> None:
    case = FAMILIES["llama"]
    model = case.model()
    handle = sparsetrain.sparsify(model, MethodConfig.from_dict({"method": "toy_entries"}))
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    model(**case.batch()).logits.square().mean().backward()
    optimizer.step()
    site: Any = handle.sites("toy_entries")["model.layers.0.mlp.up_proj"]
    old = before["model.layers.0.mlp.up_proj.weight"].flatten()
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight.flatten(), old)
    assert (site.values != old[site.places]).all()


def test_a_run_trains_the_chosen_values_alone_and_saves_them_written_in(tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path, methods=["toy_entries:ratio=0.1"], lora_r=None)
    assert recipe.lora_r == 0 and not recipe.trains_all
    result: Any = finetune(recipe, write=False)
    perplexity = result.run["perplexity"]
    assert perplexity["after_training"] < perplexity["dense"]
    assert result.trainable_parameters == sum(row["added_params"] for row in result.plan) > 0
    assert result.run["static_bytes"]["optimizer_trainable"] < 9 * result.trainable_parameters + 1000
    batch = {"input_ids": torch.arange(4, 18)[None]}
    loaded, plain = load(recipe.output), AutoModelForCausalLM.from_pretrained(result.saved)
    assert loaded.handle is not None and loaded.handle.sites("toy_entries")
    torch.testing.assert_close(loaded.model(**batch).logits, plain.eval()(**batch).logits)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not torch.allclose(dense(**batch).logits, plain(**batch).logits)
