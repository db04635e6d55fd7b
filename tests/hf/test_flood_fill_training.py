"""Dense, switch, sparse on a plain Trainer: small models from a config, resumed before and after the switch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

import sparsetrain
from sparsetrain import FloodFillAttention
from sparsetrain.hf.train.callbacks import SparsityCallback
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.measure.memory import saved_activations
from sparsetrain.runs.pictures import read_galleries
from sparsetrain.runs.sidecar import read_state
from tests.hf import runs

TOKENS, STEPS = 128, 20
CONFIG = FloodFillAttention(block_tokens=8, filter_edge=5, keep_ratio=0.2, change_threshold=0, probe_every=3,
                            max_dense_steps=9)  # fmt: skip


def gpt2(attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": TOKENS, "vocab_size": 40}
    drop = {"attn_pdrop": 0.0, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, **drop, **tokens, attn_implementation=attention))


def bert(attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    places = {"max_position_embeddings": TOKENS, "vocab_size": 40, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**sizes, **places, num_labels=2, attn_implementation=attention))


def rows(model: Any, count: int = 16) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 40, (count, TOKENS), generator=torch.Generator().manual_seed(1))
    if isinstance(model, GPT2LMHeadModel):
        return [{"input_ids": row, "labels": row} for row in ids]
    masks = [(torch.arange(TOKENS) < TOKENS - 9 * (i % 3)).long() for i in range(count)]
    return [
        {"input_ids": row * mask, "attention_mask": mask, "labels": (row[0] > 20).long()}
        for row, mask in zip(ids, masks, strict=True)
    ]


class Losses(SparsityCallback):
    """Also keeps the losses and what was reported."""

    def __init__(self, handle: sparsetrain.Handle) -> None:
        self.notes: list[str] = []
        super().__init__(handle, report=lambda event: self.notes.append(event["text"]))
        self.losses: dict[int, float] = {}
        self.rates: dict[int, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.losses[state.global_step] = kwargs["logs"]["loss"]
            self.rates[state.global_step] = kwargs["logs"]["learning_rate"]


def train(
    build: Any, folder: Path, config: FloodFillAttention = CONFIG, resume: int | None = None
) -> tuple[Losses, dict[str, Tensor], Any]:
    model = build()
    data = rows(model)
    checkpoint = folder / f"checkpoint-{resume}"
    if resume is None:
        batch = {name: torch.stack([row[name] for row in data[:4]]) for name in data[0]}
        handle = sparsetrain.sparsify(model, config, calibration=[batch])
    else:
        handle = sparsetrain.sparsify(model, config, state=read_state(checkpoint))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        warmup_steps=4,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        save_steps=1,
        logging_nan_inf_filter=False,
        dataloader_pin_memory=False,
    )
    callback = Losses(handle)
    set_seed(0)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[callback])  # type: ignore[arg-type]
    trainer.train(resume_from_checkpoint=None if resume is None else str(checkpoint))
    return callback, {name: p.detach().clone() for name, p in model.named_parameters()}, model


@pytest.mark.parametrize("build", [gpt2, bert])
def test_a_run_resumed_at_any_step_equals_the_uninterrupted_one(build: Any, tmp_path: Path) -> None:
    whole, weights, _ = train(build, tmp_path)
    assert sorted(whole.losses) == list(range(1, STEPS + 1))
    assert "2 layers are sparse from step 9 on" in whole.notes[0] and "Searching the patterns took" in whole.notes[0]
    assert len(whole.notes) == 2 and whole.notes[1].startswith("Peak memory: ")  # of the dense phase, and after it
    stats = whole.handle.report()["stats"].values()
    assert all(0 < site["density"] <= 0.2 and site["switched_at_step"] == 9 for site in stats)
    for step in (3, 4, 8, 9, 10, 19):  # at and after a probe; before, at and after the switch; the last step alone
        again, found, _ = train(build, tmp_path, resume=step)
        assert again.losses == {at: loss for at, loss in whole.losses.items() if at > step}
        assert all(torch.equal(found[name], weights[name]) for name in weights)
        for name, site in whole.handle.state().items():
            for key, value in site.items():
                assert torch.equal(again.handle.state()[name][key].nan_to_num(-1), value.nan_to_num(-1)), key


def test_the_rule_switches_by_itself_and_the_rate_starts_over(tmp_path: Path) -> None:
    config = FloodFillAttention(
        block_tokens=8, filter_edge=5, quantile=0.8, change_threshold=1000, probe_every=2, max_dense_steps=9,
        restart_lr=True, softmax="phantom_zero",
    )  # fmt: skip
    whole, weights, _ = train(gpt2, tmp_path, config)
    assert "sparse from step 6 on (the maps have settled)" in whole.notes[0]
    # warm-up of 4 steps, then linearly to 0 at 20; step s + 1 is taken at the rate of s
    assert whole.rates[6] == pytest.approx(3e-3 * 15 / 16)
    assert [whole.rates[at] for at in range(7, 13)] == pytest.approx(
        [3e-3 * x for x in (0, 1 / 4, 2 / 4, 3 / 4, 1, 15 / 16)]
    )
    again, found, _ = train(gpt2, tmp_path, config, resume=12)
    assert again.rates == {at: rate for at, rate in whole.rates.items() if at > 12}
    assert all(torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize("build", [gpt2, bert])
def test_attention_memory_after_the_switch(build: Any, tmp_path: Path) -> None:
    """Measured after the switch: attention keeps no map, and no more than fused dense attention."""
    _, _, model = train(build, tmp_path)
    batch = {name: torch.stack([row[name] for row in rows(model)[:2]]) for name in rows(model)[0]}
    saved = {}
    for name, one in (("sparse", model), ("fused", build()), ("eager", build("eager"))):
        saved[name] = saved_activations(one, lambda one=one: one(**batch).loss).by_component["attention"]
    maps = 2 * 2 * 4 * TOKENS**2 * 4  # layers, rows, heads, one map of fp32
    assert saved["sparse"] <= saved["fused"]
    assert saved["eager"] - saved["sparse"] >= 0.9 * maps  # not all of it: fused kernels keep their output


def test_finetune_switches_resumes_and_saves_its_patterns(tmp_path: Path) -> None:
    method = {"method": "flood_fill_attention", "block_tokens": 8, "filter_edge": 5, "keep_ratio": 0.5}
    recipe = runs.recipe(
        tmp_path,
        methods=[method | {"probe_every": 1, "max_dense_steps": 3, "change_threshold": 1000}],
        keep_checkpoints=9,
    )
    result = finetune(recipe)
    assert any("sparse from step 3 on (the maps have settled)" in note for note in result.notes)
    assert any(note.startswith("Peak memory") for note in result.notes)
    losses = {record["step"]: record["loss"] for record in result.run["steps"]}
    facts = [picture.facts for picture in read_galleries(tmp_path / "out")[0].pictures]
    assert [found["switched_at_step"] for found in facts] == [3, 3]
    assert all(0 < (found["density"] or 1) <= 0.5 for found in facts)
    for step in (2, 4):  # in the dense phase, and after it
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "out" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        shutil.copy(tmp_path / "out" / "recipe.yaml", folder)
        again = finetune(recipe.model_copy(update={"output": str(folder), "resume": True}))
        assert {record["step"]: record["loss"] for record in again.run["steps"]} == losses
