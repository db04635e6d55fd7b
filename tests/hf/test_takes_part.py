"""A converted model given to any trainer is driven and saved right, whether a callback is passed or not."""

from __future__ import annotations

import copy
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import sparsetrain
from sparsetrain import PQAttention, RoutedFFN, TokenSelection
from sparsetrain.core.errors import CheckpointError
from sparsetrain.hf.model.io import load
from sparsetrain.hf.train.callbacks import Sparsifies
from sparsetrain.runs.sidecar import read_sidecar
from sparsetrain.surgery.record import handles_of
from tests.field.test_saved import LATE_FLOOD, RECIPES, adapted, converted, ids, logits, losses, trainer
from tests.hf.test_trl import tokenizer


class Watch:
    """The steps that a handle was told of."""

    def __init__(self, handle: sparsetrain.Handle) -> None:
        self.steps: list[int] = []
        drive = handle.step

        def step(at: int, *rest: Any, **more: Any) -> list[str]:
            self.steps.append(at)
            return drive(at, *rest, **more)

        handle.step = step  # type: ignore[method-assign]


ONCE = [0, 0, 1, 2]
"""At the beginning, and before each of three steps."""


@pytest.mark.parametrize("way", ["none", "passed", "added", "two trainers", "converted later", "copy"])
def test_it_is_driven_once_whoever_passes_what(tmp_path: Path, way: str) -> None:
    model, handle = converted(tmp_path, RECIPES["routed"], lora=False)
    if way == "copy":
        model = copy.deepcopy(model)
        (handle,) = handles_of(model)
    if way == "converted later":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    own = handle.callback()
    run = trainer(model, tmp_path / "out", [own] if way in ("passed", "two trainers") else [])
    if way == "added":
        run.add_callback(own)
    if way == "two trainers":
        run = trainer(model, tmp_path / "out", [])
    if way == "converted later":
        handle = sparsetrain.sparsify(model, *RECIPES["routed"], calibration=[{"input_ids": ids(4, 1)}])
    watch = Watch(handle)
    run.train()
    assert watch.steps == (ONCE if way != "added" else [0, *ONCE])
    assert read_sidecar(tmp_path / "out")["configs"][0]["method"] == "routed_ffn"


def test_a_callback_converts_the_model_of_a_trainer_that_others_make(tmp_path: Path) -> None:
    converted(tmp_path, [TokenSelection()], lora=False)  # makes the folder
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    converts = Sparsifies(RECIPES["routed"][0], calibration=[{"input_ids": ids(4, 1)}], deploy="dense")
    run = trainer(model, tmp_path / "out", [converts])
    watch = Watch(converts.handle)
    run.train()
    assert watch.steps == ONCE and handles_of(model) == [converts.handle]
    run.save_model(str(tmp_path / "saved"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = logits(model)
    assert not torch.allclose(logits(plain), expected, atol=1e-4)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(plain, str(tmp_path / "saved"))), expected)


def test_it_is_driven_inside_an_adapter_and_a_dense_model_is_left_alone(tmp_path: Path) -> None:
    model, handle = converted(tmp_path, RECIPES["spt"], lora=True)
    watch = Watch(handle)
    run = trainer(model, tmp_path / "out", [], save_strategy="steps", save_steps=2)
    run.train()
    assert watch.steps == ONCE
    run.save_model(str(tmp_path / "final"))
    expected = logits(model)
    torch.testing.assert_close(logits(load(tmp_path / "final").model), expected, rtol=0, atol=1e-5)
    assert read_sidecar(tmp_path / "out" / "checkpoint-2")["configs"]
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer(dense, tmp_path / "dense", []).train()
    assert not list((tmp_path / "dense").glob("sparsity*"))


@pytest.mark.parametrize(("name", "lora"), [("routed", False), ("flood", True), ("2:4", False)])
def test_a_plain_trainer_goes_on_under_another_calibration_with_the_same_numbers(
    tmp_path: Path, name: str, lora: bool
) -> None:
    model, _ = converted(tmp_path, RECIPES[name], lora)
    whole = trainer(model, tmp_path / "out", [], save_strategy="steps", save_steps=2)
    whole.train()
    checkpoint = shutil.move(tmp_path / "out" / "checkpoint-2", tmp_path / "moved")
    again, _ = converted(tmp_path, RECIPES[name], lora, seed=9)
    rest = trainer(again, tmp_path / "elsewhere", [])
    rest.train(resume_from_checkpoint=str(checkpoint))
    assert losses(rest) == losses(whole)


def test_a_plain_trainer_does_not_go_on_under_other_settings(tmp_path: Path) -> None:
    model, _ = converted(tmp_path, RECIPES["late flood"], lora=False)
    trainer(model, tmp_path / "out", [], save_strategy="steps", save_steps=2).train()
    other = LATE_FLOOD.__class__(**{**vars_of(LATE_FLOOD), "keep_ratio": 0.3})
    again, _ = converted(tmp_path, [other], lora=False)
    with pytest.raises(CheckpointError, match=r"other settings \(keep_ratio=0.15 there and 0.3 here\)"):
        trainer(again, tmp_path / "out", []).train(resume_from_checkpoint=True)


def vars_of(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name != "method"}


def test_what_a_method_refuses_is_refused_when_the_trainer_is_made(tmp_path: Path) -> None:
    model, _ = converted(tmp_path, [TokenSelection()], lora=False)
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer(model, tmp_path / "out", [], label_smoothing_factor=0.1)


@pytest.mark.filterwarnings("default")
def test_trl_drives_it(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    AcceleratorState._reset_state(reset_partial_state=True)
    model, handle = converted(tmp_path, [RoutedFFN.example(), PQAttention.example()], lora=False)
    watch = Watch(handle)
    rows = [" ".join(f"w{3 + (i * j) % 15}" for j in range(1, 40)) for i in range(1, 9)]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=2, max_length=64, report_to=[],
        use_cpu=True, bf16=False, save_strategy="no",
    )  # fmt: skip
    run = trl.SFTTrainer(
        model=adapted(model, handle),
        args=arguments,
        train_dataset=Dataset.from_dict({"text": rows}),
        processing_class=tokenizer(),
    )
    run.train()
    assert watch.steps == ONCE


def test_a_loop_of_ones_own_that_drives_nothing_is_told_once(tmp_path: Path, caplog: Any) -> None:
    model, _ = converted(tmp_path, RECIPES["routed"], lora=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING, logger="sparsetrain"):
        for _ in range(6):
            model(input_ids=ids(1, 2), labels=ids(1, 2)).loss.backward()
            optimizer.step()
    assert len([r for r in caplog.records if "nothing calls handle.step" in r.getMessage()]) == 1
    caplog.clear()
    model, _ = converted(tmp_path, RECIPES["routed"], lora=False)
    trainer(model, tmp_path / "out", [], steps=6).train()
    assert not caplog.records
