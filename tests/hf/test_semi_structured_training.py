"""2:4 training with transformers' Trainer: resuming, decay, notes, and files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import sparsetrain
from sparsetrain import SemiStructured
from sparsetrain.hf.model.io import export, load, save
from sparsetrain.hf.train.callbacks import SparsityCallback
from sparsetrain.methods.semi_structured.flips import flip_curve
from sparsetrain.runs.sidecar import read_state
from tests.families import FAMILIES
from tests.methods.test_semi_structured import CONTROLS


def rows(count: int = 64) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 61, (count, 24), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(defaults | options))


def run(model: Any, handle: Any, folder: Path, resume: Path | None = None, **options: Any) -> dict[int, float]:
    """Loss of every step."""
    trainer = Trainer(
        model=model,
        args=arguments(folder, **options),
        train_dataset=rows(),  # type: ignore[arg-type]
        callbacks=[SparsityCallback(handle, report=lambda event: None)],
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}


@pytest.mark.parametrize("name", ["fst", "s_ste"])
def test_resuming_before_and_after_the_switch_repeats_the_losses(name: str, tmp_path: Path) -> None:
    config = dataclasses.replace(CONTROLS[name], refresh_every=4)
    case = FAMILIES["llama"]
    model = case.model()
    handle = sparsetrain.sparsify(model, config)
    whole = run(model, handle, tmp_path, save_strategy="steps", save_steps=1)
    assert (model.model.layers[0].mlp.up_proj.packed is None) == (name == "fst")
    for step in (4, 7, 10, 11):  # a refresh, between two, the switch, the tail
        checkpoint = tmp_path / f"checkpoint-{step}"
        again = case.model(seed=1)
        resumed = sparsetrain.sparsify(again, config, state=read_state(checkpoint))
        losses = run(again, resumed, tmp_path / "again", resume=checkpoint)
        assert {s: losses[s] for s in range(step + 1, 13)} == {s: whole[s] for s in range(step + 1, 13)}, step
        assert flip_curve(resumed) == flip_curve(handle)
        for key, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key


def test_the_trainer_adds_the_decay_between_clipping_and_the_optimizer(tmp_path: Path) -> None:
    model = FAMILIES["llama"].model()
    handle = sparsetrain.sparsify(model, SemiStructured(decay=1.0, dense_tail_ratio=0.0))  # a run of one step
    linear = model.model.layers[0].mlp.up_proj
    order: list[str] = []
    adjust = handle.adjust_gradients
    weight_before = linear.weight.detach().clone()

    def watched() -> None:
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        assert norm < 1.001e-4, "clipped by now"
        assert torch.equal(linear.weight, weight_before), "the optimizer has not stepped yet"
        adjust()
        order.append("decay")
        kept = weight_before.masked_fill(linear.mask, 0)
        assert (linear.weight.grad - kept).norm() < 1e-3 * kept.norm()

    handle.adjust_gradients = watched  # type: ignore[method-assign]
    run(model, handle, tmp_path, max_steps=1, max_grad_norm=1e-4)
    assert order == ["decay"]
    assert not torch.equal(linear.weight, weight_before)


def test_the_trainer_says_what_the_products_run_on(tmp_path: Path) -> None:
    model = FAMILIES["llama"].model()
    handle = sparsetrain.sparsify(model, SemiStructured())
    told: list[Any] = []
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=1),
        train_dataset=rows(),  # type: ignore[arg-type]
        callbacks=[SparsityCallback(handle, report=told.append)],
    )
    trainer.train()
    assert [event["event"] for event in told] == ["note"] and "emulation, no speed" in told[0]["text"]
    assert handle.report()["notes"] == [told[0]["text"]]


@pytest.mark.parametrize("name", ["fst", "s_ste"])
def test_saved_loaded_and_exported_models_give_the_same_logits(name: str, tmp_path: Path) -> None:
    case = FAMILIES["llama"]
    model, batch = case.model(), case.batch()
    handle = sparsetrain.sparsify(model, dataclasses.replace(CONTROLS[name], refresh_every=2))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(4):
        handle.step(step, 6)
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        expected = model(**batch).logits
        save(model, handle, tmp_path / "saved")
        assert torch.equal(load(tmp_path / "saved").model(**batch).logits, expected)
        with pytest.raises(ValueError, match="--format 24"):
            export(tmp_path / "saved", tmp_path / "refused", format="dense")
        plain = load(export(tmp_path / "saved", tmp_path / "24", format="24"))
        assert plain.handle is None
        torch.testing.assert_close(plain.model(**batch).logits, expected)
        assert (plain.model.model.layers[0].mlp.up_proj.weight == 0).float().mean() >= 0.5
        again = load(export(tmp_path / "saved", tmp_path / "sparse"))
        torch.testing.assert_close(again.model(**batch).logits, expected)
    with pytest.raises(ValueError, match="needs a model trained with semi_structured"):
        export(tmp_path / "24", tmp_path / "twice", format="24")
