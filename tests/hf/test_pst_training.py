"""PST in whole runs: what trains, resuming, saving, LoRA on top, export, under our command and under any Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import sparsetrain
from sparsetrain import PST
from sparsetrain.core.anatomy import describe
from sparsetrain.hf.model.io import export, load
from sparsetrain.hf.train.finetune import Result, finetune
from sparsetrain.ops.topk_mask import count_zeros
from sparsetrain.recipes.finetune import Recipe
from tests.families import FAMILIES
from tests.hf import runs
from tests.hf.test_checkpoint import losses, resume, stopped
from tests.hf.test_finetune import labelled

PRUNED = {"method": "pst", "keep_ratio": 0.5, "weight_rank": 4, "score_rank": 4}


def recipe(folder: Path, **changes: Any) -> Recipe:
    """Of twelve steps; neither `lora_r` nor `deploy` is given."""
    made = runs.recipe(folder)
    values = made.model_dump(exclude={"lora_r", "deploy", "methods"})
    return Recipe.from_values({**values, "methods": [PRUNED], "steps": 12, **changes})


def test_no_lora_and_a_sparse_product_unless_asked(tmp_path: Path) -> None:
    asked = recipe(tmp_path)
    assert (asked.lora_r, asked.deploy, asked.trains_all) == (0, "sparse", False)
    assert recipe(tmp_path, lora_r=2).lora_r == 2
    with pytest.raises(ValueError, match=r"pst trains a model to be used sparse\. Give deploy=sparse"):
        recipe(tmp_path, deploy="dense")
    assert Recipe.from_values({"model": "m", "data": "d", "methods": []}).deploy == "dense"


@pytest.mark.parametrize("changes", [{}, {"lora_r": 2}, {"methods": [{**PRUNED, "scope": "global"}]}])
def test_a_run_trains_the_factors_alone_and_goes_on_as_if_never_stopped(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Takes seconds: three runs, one of them stopped."""
    whole = finetune(recipe(tmp_path, output=str(tmp_path / "whole"), **changes), write=False)
    added = sum(row["added_params"] for row in whole.plan)
    lora = 0 if not changes.get("lora_r") else whole.trainable_parameters - added
    assert whole.trainable_parameters == added + lora and (lora > 0) == ("lora_r" in changes)
    perplexity = whole.run["perplexity"]
    assert perplexity["after_training"] < perplexity["dense"]
    parts = recipe(tmp_path, output=str(tmp_path / "parts"), **changes)
    stopped(parts, 7)
    again = resume(parts)
    assert again.resumed_from == 6 and losses(again) == losses(whole)
    assert_same_files(whole, again)


def assert_same_files(one: Result, other: Result) -> None:
    for file in one.saved.glob("*.safetensors"):
        ours, theirs = load_file(file), load_file(other.saved / file.name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_export_of_a_run_loads_plainly_with_exact_zeros(tmp_path: Path) -> None:
    result = finetune(recipe(tmp_path), write=False)
    ids = torch.arange(4, 18)[None]
    with torch.no_grad():
        expected = load(tmp_path / "out").model(input_ids=ids).logits
        export(tmp_path / "out", tmp_path / "pruned", format="pruned")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").float()
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=2e-2, atol=2e-2)
        assert not torch.allclose(dense(input_ids=ids).logits, expected, rtol=2e-2, atol=2e-2)
    for site in describe(plain).linears:
        weight = plain.get_parameter(f"{site.name}.weight")
        assert int((weight == 0).sum()) == count_zeros(weight.numel(), 0.5)
    with pytest.raises(ValueError, match=r"--format pruned"):
        export(tmp_path / "out", tmp_path / "refused", format="dense")
    assert not (tmp_path / "refused").exists() and result.saved.name == "model"


def test_lora_on_top_is_loaded_and_not_merged(tmp_path: Path) -> None:
    finetune(recipe(tmp_path, lora_r=2), write=False)
    loaded = load(tmp_path / "out")
    assert loaded.handle is not None and loaded.handle.sites("pst") and hasattr(loaded.model, "peft_config")
    with pytest.raises(ValueError, match="the weight is pruned, so merged outputs would differ"):
        export(tmp_path / "out", tmp_path / "refused", format="pruned")


def head_of_a_run(folder: Path, train_head: bool, train_norms: bool) -> Tensor:
    """The trained classifier's weight, after the trained parameters were counted."""
    asked = recipe(
        folder,
        data=str(folder / "day.csv"),
        output=str(folder / f"{train_head}{train_norms}"),
        task="classify",
        seq_len=16,
        batch_size=8,
        save_every=0,
        dtype="fp32",
        methods=[{**PRUNED, "train_head": train_head, "train_norms": train_norms}],
    )
    result = finetune(asked, write=False)
    model = load(result.saved).model
    counts = {"pst": sum(row["added_params"] for row in result.plan)}
    counts["head"] = sum(p.numel() for part in (model.classifier, model.bert.pooler) for p in part.parameters())
    counts["norms"] = sum(p.numel() for name, p in model.bert.encoder.named_parameters() if "LayerNorm" in name)
    trained = {"pst": True, "head": train_head, "norms": train_norms}
    assert result.trainable_parameters == sum(counts[part] for part in counts if trained[part])
    return model.classifier.weight.detach()


def test_a_new_head_trains_unless_it_is_left_as_drawn_and_norms_if_asked(tmp_path: Path) -> None:
    runs.bert(tmp_path / "model")
    labelled(tmp_path / "day.csv")
    drawn = head_of_a_run(tmp_path, False, False)
    assert torch.equal(head_of_a_run(tmp_path, False, True), drawn)
    assert not torch.equal(head_of_a_run(tmp_path, True, False), drawn)


def test_decay_spares_the_factors_under_any_trainer(tmp_path: Path) -> None:
    case = FAMILIES["llama"]
    model = case.model()
    handle = sparsetrain.sparsify(model, PST(keep_ratio=0.5, weight_rank=2, score_rank=2))
    ids = torch.randint(3, 61, (8, 24), generator=torch.Generator().manual_seed(0))
    rows: Any = [{"input_ids": row, "labels": row} for row in ids]
    options: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    options |= {"output_dir": str(tmp_path), "max_steps": 2, "weight_decay": 0.1, "dataloader_pin_memory": False}
    trainer = Trainer(model=model, args=TrainingArguments(**options), train_dataset=rows)
    trainer.train()
    groups: Any = trainer.optimizer.param_groups  # type: ignore[union-attr]
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    ours = {id(p) for site in handle.sites("pst").values() for p in site.parameters()}
    assert decayed and not decayed & ours
    assert ours <= {id(p) for group in groups for p in group["params"]}
    with pytest.raises(ValueError, match="load_best_model_at_end compares checkpoints of unequal sparsity"):
        best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
        Trainer(model=model, args=TrainingArguments(**options | best), train_dataset=rows, eval_dataset=rows).train()


def test_an_adapter_of_ones_own_freezes_the_factors_and_is_told_so(tmp_path: Path) -> None:
    model = FAMILIES["llama"].model()
    handle = sparsetrain.sparsify(model, PST(keep_ratio=0.5, weight_rank=2, score_rank=2))
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"))
    ids: Tensor = torch.randint(3, 61, (4, 24))
    rows: Any = [{"input_ids": row, "labels": row} for row in ids]
    options: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, dataloader_pin_memory=False, **options)
    with pytest.raises(ValueError, match=r"is frozen, .*Call handle\.sites\('pst'\).*requires_grad_\(True\)"):
        Trainer(model=wrapped, args=arguments, train_dataset=rows).train()
    for site in handle.sites("pst").values():
        site.requires_grad_(True)
    Trainer(model=wrapped, args=arguments, train_dataset=rows).train()
