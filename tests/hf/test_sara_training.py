"""SaRA in runs: what is trained and saved, going on after an interruption, LoRA on top, and what a plan says of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from sparsetrain import SaRA, sparsify
from sparsetrain.core.errors import CheckpointError
from sparsetrain.hf.model.io import export, load
from sparsetrain.hf.study.recipe_trace import outline
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.measure.memory import static_memory
from sparsetrain.methods.sara.config import learning_rate
from sparsetrain.methods.sara.delta import apply_delta
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.runs.sidecar import read_sidecar, read_state
from tests.families import FAMILIES
from tests.hf import runs
from tests.hf.test_checkpoint import losses, resume, stopped
from tests.hf.test_outline import llama, real, recipe

ENTRIES = {"method": "sara", "fraction": 0.3}
OWN: dict[str, Any] = {"lora_r": None, "deploy": "dense", "methods": [ENTRIES]}
KINDS: dict[str, dict[str, Any]] = {
    "fresh moments": {},
    "kept moments": {"methods": [ENTRIES | {"keep_state": True}]},
    "accumulating": {"batch_size": 1, "grad_accum": 2},
    "rows": {"methods": [ENTRIES | {"block": "rows"}]},
    "LoRA on top": {"lora_r": 4, "deploy": "sparse"},
    "used sparse": {"deploy": "sparse"},
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(4, 18)[None]).logits


def test_a_run_trains_entries_alone_and_leaves_a_plain_model_and_a_small_file(tmp_path: Path) -> None:
    asked = runs.recipe(tmp_path, **OWN)
    assert asked.lora_r == 0 and asked.lr == 1e-2 and asked.weight_decay == 0.01 and not asked.trains_all
    result = finetune(asked, write=False)
    perplexity = result.run["perplexity"]
    assert perplexity["after_training"] < perplexity["dense"]
    assert any("still below theta" in note for note in result.notes)
    plain = AutoModelForCausalLM.from_pretrained(result.saved)
    assert read_sidecar(result.saved)["configs"] == []
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not torch.equal(logits(base), logits(plain))
    assert torch.equal(logits(apply_delta(base, tmp_path / "out" / "delta.safetensors")), logits(plain))
    assert torch.equal(logits(load(asked.output).model), logits(plain))
    same = [name for name, p in base.named_parameters() if "embed" in name or "norm" in name]
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert same and all(torch.equal(plain.state_dict()[name], original[name]) for name in same)


def test_the_learning_rate_follows_from_theta_where_none_is_given(tmp_path: Path) -> None:
    asked = runs.recipe(tmp_path, **OWN, lr=None, lr_schedule="constant", save_every=0)
    assert asked.lr is None and "\nlr:" not in asked.to_yaml()
    result = finetune(asked, write=False)
    theta = {values["theta"] for values in result.sparsity["stats"].values()}
    assert len(theta) == 1
    assert result.run["steps"][0]["learning_rate"] == pytest.approx(learning_rate(theta.pop()))
    assert any("below theta = " in note and "learning rate" in note for note in result.notes)
    assert Recipe.from_yaml(tmp_path / "out" / "recipe.yaml").lr is None
    assert Recipe.from_values({"model": "m", "data": "d", "methods": [], "lr": None}).lr == 2e-4


PLACES = [*((kind, 4) for kind in KINDS), *((kind, after) for kind in list(KINDS)[:2] for after in (3, 5))]
"""Stopped before the step of the adjustment (3 of 6), right after it, and later."""


@pytest.mark.parametrize(("kind", "after"), PLACES)
def test_a_resumed_run_reproduces_the_uninterrupted_one(kind: str, after: int, tmp_path: Path) -> None:
    """Takes some three seconds: two runs and a half, saved at every step."""
    values = {**OWN, **KINDS[kind], "save_every": 1}
    whole = finetune(runs.recipe(tmp_path, output=str(tmp_path / "whole"), **values), write=False)
    again = runs.recipe(tmp_path, output=str(tmp_path / "parts"), **values)
    stopped(again, after)
    found = resume(again)
    assert found.resumed_from == after - 1
    assert losses(found) == losses(whole) and len(set(losses(whole))) == len(losses(whole))
    for file in whole.saved.glob("*.safetensors"):
        one, other = load_file(file), load_file(found.saved / file.name)
        assert one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)
    deltas = [load_file(Path(r.recipe.output) / "delta.safetensors") for r in (whole, found)]
    assert all(torch.equal(deltas[0][key], deltas[1][key]) for key in deltas[0])


def test_lora_on_top_trains_too_and_both_are_loaded(tmp_path: Path) -> None:
    asked = runs.recipe(tmp_path, **OWN | {"lora_r": 4, "save_every": 0, "deploy": "sparse"})
    assert Recipe.from_values({"model": "m", "data": "d", "methods": ["sara"], "lora_r": "4"}).deploy == "sparse"
    result = finetune(asked, write=False)
    loaded = load(asked.output, trainable=True)
    state = read_state(result.saved)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    key = next(iter(state))
    weight = base.get_submodule(key.removesuffix(":sara")).weight.detach().flatten()
    assert (weight[state[key]["weight.places"].long()] != state[key]["weight.values"]).any(), "entries have moved"
    factors = load_file(result.saved / "adapter_model.safetensors")
    assert any(value.any() for name, value in factors.items() if "lora_B" in name)
    expected = logits(loaded.model)
    export(asked.output, tmp_path / "merged", format="dense")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)
    export(asked.output, tmp_path / "beside")
    torch.testing.assert_close(logits(load(tmp_path / "beside").model), expected)
    with pytest.raises(ValueError, match=r"deploy=dense with lora_r=4 and sara"):
        runs.recipe(tmp_path, **OWN | {"lora_r": 4, "deploy": "dense"})


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_was_trained_under_lora_loads_on_its_own_base_alone(dtype: str, tmp_path: Path) -> None:
    asked = runs.recipe(tmp_path, **OWN | {"lora_r": 4, "save_every": 0, "deploy": "sparse", "dtype": dtype})
    finetune(asked, write=False)
    load(asked.output)  # in fp32, whatever it was trained in
    load(asked.output, dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    base.model.layers[1].mlp.up_proj.weight.data[3, 4] += 0.5
    base.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight belongs to other weights than this"):
        load(asked.output)


@pytest.mark.parametrize("reentrant", ["non-reentrant", "reentrant"])
def test_recomputed_blocks_train_alike(reentrant: str, tmp_path: Path) -> None:
    values = OWN | {"save_every": 0}
    plain = finetune(runs.recipe(tmp_path, output=str(tmp_path / "a"), **values), write=False)
    again = runs.recipe(tmp_path, output=str(tmp_path / "b"), **values, gradient_checkpointing=reentrant)
    assert losses(finetune(again, write=False)) == pytest.approx(losses(plain), rel=1e-5)


def test_a_plain_trainer_drives_and_continues_it(tmp_path: Path) -> None:
    ids = torch.randint(3, 61, (64, 24), generator=torch.Generator().manual_seed(0))
    rows: Any = [{"input_ids": row, "labels": row} for row in ids]

    def run(folder: str, resume: str | None = None) -> list[float]:
        model = FAMILIES["llama"].model().requires_grad_(False)
        sparsify(model, SaRA(fraction=0.3))
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=8, per_device_train_batch_size=2, learning_rate=1e-2,
            use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, save_steps=6,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    whole = run("a")
    assert run("b", str(tmp_path / "a" / "checkpoint-6")) == whole


def test_fraction_one_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fraction=1 trains every entry\. Leave the method out"):
        finetune(runs.recipe(tmp_path, **OWN | {"methods": [{"method": "sara", "fraction": 1.0}]}), write=False)


@pytest.mark.parametrize("values", [{}, {"block": "rows"}, {"fraction": 0.3}], ids=["entries", "rows", "30 %"])
@pytest.mark.parametrize("lora_r", [0, 4])
def test_the_plan_has_the_bytes_of_a_real_step(values: dict[str, Any], lora_r: int) -> None:
    """Entries are spread over the tensors evenly in a plan, and by their size in a model; their number is the same."""
    asked = recipe(methods=[{"method": "sara", **values}], lora_r=lora_r)
    found = outline(asked, llama(), bf16=False, lengths=(128,))
    model, step = real(asked, llama())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    step().backward()
    optimizer.step()
    static = static_memory(model, optimizer)
    counted = max(p.numel() for p in model.parameters()) if values.get("block") else 40  # ends of blocks, of tensors
    for name in ("parameters_trainable", "gradients", "buffers"):
        assert abs(getattr(found.static, name) - getattr(static, name)) <= 8 * counted, name
    assert abs(found.static.optimizer - static.optimizer_trainable) <= 8 * counted
    assert found.static.parameters_frozen == static.parameters_frozen


def test_blocks_save_the_products_of_the_weight_gradient() -> None:
    def products(block: str, **more: Any) -> float:
        asked = recipe(methods=[{"method": "sara", "block": block}], lora_r=0, **more)
        return outline(asked, llama(), bf16=False, lengths=(128,)).work(128)["gemm fp32"][0]

    linears = 5 * 2 * 128 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)  # of one product of each
    saved = products("entries") - products("rows")
    assert saved == pytest.approx(0.9 * linears, rel=0.05)


def test_of_frozen_values_the_trainer_is_told(tmp_path: Path) -> None:
    model = FAMILIES["llama"].model()
    handle = sparsify(model, SaRA())
    model.requires_grad_(False)
    ids = torch.randint(3, 61, (4, 24))
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": r, "labels": r} for r in ids])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"is frozen.*requires_grad_\(True\)"):
        trainer.train()
    assert copy.deepcopy(handle.state())
