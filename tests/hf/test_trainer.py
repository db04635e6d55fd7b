"""The callbacks on a plain transformers Trainer, as a user of the library would pass them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import sparsetrain
from sparsetrain import RoutedFFN
from sparsetrain.hf.train.callbacks import SparsityCallback, StepRecorder
from sparsetrain.hf.train.checks import check_forwards, check_trainable
from sparsetrain.hf.train.finite import FiniteCallback
from sparsetrain.runs.progress import ProgressBar
from sparsetrain.runs.sidecar import SIDECAR, STATE, read_sidecar, read_state
from tests.hf import runs

CONFIG = RoutedFFN(num_blocks=4, num_active=2, warmup_ratio=0.5)


def converted(folder: Path) -> tuple[Any, sparsetrain.Handle]:
    if not (folder / "model").exists():
        runs.llama(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    return model, sparsetrain.sparsify(model, CONFIG)


def rows(count: int = 16) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 15, (count, 24), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(model: Any, folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "include_num_input_tokens_seen": "all",
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(**(defaults | options))
    return Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=list(callbacks))  # type: ignore[arg-type]


class Watch(SparsityCallback):
    """Notes what the schedule was told."""

    def __init__(self, handle: Any) -> None:
        super().__init__(handle)
        self.told: list[tuple[Any, ...]] = []
        drive = handle.step
        handle.step = lambda *arguments: (self.told.append(arguments), drive(*arguments))[1]


def test_the_schedule_follows_the_global_step_once_an_optimizer_step(tmp_path: Path) -> None:
    model, handle = converted(tmp_path)
    watch = Watch(handle)
    trainer(model, tmp_path, watch, gradient_accumulation_steps=3, max_steps=2).train()
    assert watch.told == [(0, 2, 1 / 3), (0, 2, 1 / 3), (1, 2, 1 / 3)]


def test_the_schedule_goes_on_where_a_resumed_run_does(tmp_path: Path) -> None:
    model, handle = converted(tmp_path)
    trainer(model, tmp_path, SparsityCallback(handle), save_strategy="steps", save_steps=3).train()
    again, handle = converted(tmp_path)
    watch = Watch(handle)
    trainer(again, tmp_path, watch).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert watch.told == [(3, 4, 1.0), (3, 4, 1.0)]


@pytest.mark.parametrize("checkpointing", ["non-reentrant", "reentrant"])
def test_auxiliary_losses_and_gradients_are_equal_whatever_recomputes(tmp_path: Path, checkpointing: str) -> None:
    gradients = []
    for mode in ("none", checkpointing):
        model, handle = converted(tmp_path)
        torch.manual_seed(0)
        model = get_peft_model(
            model, LoraConfig(r=2, target_modules="all-linear", modules_to_save=handle.modules_to_save)
        )
        model.enable_input_require_grads()
        if mode != "none":
            model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
        handle.step(3, 4)
        model.train()
        batch = torch.stack([row["input_ids"] for row in rows(2)])
        model(input_ids=batch, labels=batch).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, expected in gradients[0].items():
        assert expected is not None and gradients[1][name] is not None, name
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-7)
    assert sum("router" in name for name in gradients[0]) == 4


def test_the_sidecar_is_in_every_checkpoint_and_at_the_end(tmp_path: Path) -> None:
    model, handle = converted(tmp_path)
    trainer(model, tmp_path, SparsityCallback(handle, base_model="m"), save_strategy="steps", save_steps=2).train()
    for folder in ("out/checkpoint-2", "out/checkpoint-4", "out"):
        about = read_sidecar(tmp_path / folder)
        assert about["configs"][0]["method"] == "routed_ffn" and about["base_model"] == "m"
        assert about["model_class"] == "LlamaForCausalLM" and about["versions"]["torch"]
    one, other = (read_state(tmp_path / "out" / f"checkpoint-{step}") for step in (2, 4))
    key = "model.layers.0.mlp:routed_ffn"
    assert not torch.equal(one[key]["router.weight"], other[key]["router.weight"])


def test_no_sidecar_at_the_end_where_it_is_not_wanted(tmp_path: Path) -> None:
    model, handle = converted(tmp_path)
    trainer(model, tmp_path, SparsityCallback(handle, at_end=False)).train()
    assert not (tmp_path / "out" / SIDECAR).exists() and not (tmp_path / "out" / STATE).exists()


def test_a_forward_bound_over_ours_is_refused_at_train_begin(tmp_path: Path) -> None:
    model, handle = converted(tmp_path)
    check_forwards(handle)
    module = model.model.layers[1].mlp
    module.forward = lambda x: x  # as kernel patches do
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp.*patched on the instance"):
        trainer(model, tmp_path, SparsityCallback(handle)).train()
    del module.forward
    module._hf_hook = object()
    with pytest.raises(ValueError, match="offload hook"):
        check_forwards(handle)


def test_parameters_that_peft_froze_are_refused_at_train_begin(tmp_path: Path) -> None:
    model, handle = converted(tmp_path)
    check_trainable(handle)
    frozen = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"router\.weight.*modules_to_save=\['router'\]"):
        trainer(frozen, tmp_path, SparsityCallback(handle)).train()
    model, handle = converted(tmp_path)
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", modules_to_save=handle.modules_to_save))
    check_trainable(handle)


def test_the_recorder_counts_steps_tokens_and_time(tmp_path: Path) -> None:
    model, _ = converted(tmp_path)
    told: list[dict[str, Any]] = []
    recorder = StepRecorder(told.append)
    trainer(model, tmp_path, recorder, gradient_accumulation_steps=2).train()
    assert [row["step"] for row in recorder.records] == [1, 2, 3, 4]
    assert all(row["tokens"] == 2 * 2 * 24 for row in recorder.records)
    assert all(row["step_time_s"] > 0 and row["memory_bytes"] > 2**20 for row in recorder.records)
    assert recorder.wall_s == pytest.approx(sum(row["step_time_s"] for row in recorder.records))
    assert [event["step"] for event in told] == [1, 2, 3, 4] and told[0]["steps"] == 4


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    model, _ = converted(tmp_path)
    model.lm_head.weight.data.fill_(float("inf"))
    with pytest.raises(RuntimeError, match="after step 1: training has diverged"):
        trainer(model, tmp_path, FiniteCallback(None), logging_nan_inf_filter=False).train()


STEP = {
    "event": "step", "step": 1, "steps": 2, "loss": 1.5, "tokens": 64, "step_time_s": 0.5, "memory_bytes": 2**30,
}  # fmt: skip


def test_the_bar_shows_loss_speed_and_memory_on_a_terminal() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=200)
    with ProgressBar(console) as bar:
        bar({"event": "phase", "name": "fitting", "share": 0.5})
        bar(STEP)
        bar({"event": "quality", "stage": "after_training", "metric": "accuracy", "value": 0.75})
    shown = stream.getvalue()
    assert "loss 1.500" in shown and "128 tokens/s" in shown and "1,024 MiB" in shown
    assert "accuracy after training: 75.0%" in shown


def test_without_a_terminal_there_are_lines_and_no_bar() -> None:
    stream = io.StringIO()
    with ProgressBar(Console(file=stream, width=8)) as bar:
        bar({"event": "phase", "name": "fitting", "share": 0.5})
        bar(STEP | {"side": "dense"})
        bar({"event": "note", "text": "[a note]", "side": "dense"})
    assert stream.getvalue() == "dense: [a note]\n"  # in one piece, however narrow
