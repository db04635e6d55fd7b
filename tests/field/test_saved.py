"""Models that others save, load and go on with: what comes back is what was there, or the reason why it cannot be."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import sparsetrain
from sparsetrain import FloodFillAttention, PQAttention, RoutedFFN, SemiStructured, TokenSelection
from sparsetrain.core.errors import CheckpointError
from sparsetrain.hf.model.io import export, load, save
from sparsetrain.runs.manifest import MANIFEST
from sparsetrain.runs.sidecar import SIDECAR, STATE, read_sidecar
from tests.hf import runs

ROUTED = RoutedFFN(num_blocks=4, num_active=2, shared_ratio=0.25, partition="clustered", compensation="mean")
FLOOD = FloodFillAttention(block_tokens=8, filter_edge=5, keep_ratio=0.15, change_threshold=0, max_dense_steps=0)
LATE_FLOOD = FloodFillAttention(
    block_tokens=8, filter_edge=5, keep_ratio=0.15, change_threshold=0, probe_every=1, max_dense_steps=3
)
RECIPES: dict[str, list[Any]] = {
    "routed": [ROUTED],
    "pq": [PQAttention(granularity="token", num_keys=24)],
    "flood": [FLOOD],
    "late flood": [LATE_FLOOD],
    "2:4": [SemiStructured(refresh_every=2)],
    "tokens": [TokenSelection()],
    "spt": [ROUTED, PQAttention(num_keys=16, block_q=8, block_k=8, local_tokens=4)],
}
PLACES = [(name, lora) for name in RECIPES for lora in (True, False) if (name, lora) != ("2:4", True)]
TOKENS = 64


def ids(rows: int, seed: int) -> torch.Tensor:
    return torch.randint(4, 19, (rows, TOKENS), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, x: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids(1, 5) if x is None else x).logits


def converted(folder: Path, configs: list[Any], lora: bool, seed: int = 1) -> tuple[Any, sparsetrain.Handle]:
    """A model in memory; another seed of the calibration gives other patterns and permutations."""
    if not (folder / "base").exists():
        runs.llama(folder / "base")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base")
    handle = sparsetrain.sparsify(model, *configs, calibration=[{"input_ids": ids(4, seed)}])
    torch.manual_seed(0)
    return (adapted(model, handle) if lora else model), handle


def adapted(model: Any, handle: sparsetrain.Handle, **options: Any) -> Any:
    return get_peft_model(
        model, LoraConfig(r=2, target_modules="all-linear", modules_to_save=handle.modules_to_save or None, **options)
    )


def trainer(model: Any, out: Path, callbacks: list[Any], steps: int = 3, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {"save_strategy": "no", "learning_rate": 2e-2}
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        disable_tqdm=True, logging_steps=1, dataloader_pin_memory=False, label_names=["labels"], **(defaults | options),
    )  # fmt: skip
    rows, held_out = ([{"input_ids": x, "labels": x.clone()} for x in ids(n, seed)] for n, seed in ((8, 2), (2, 77)))
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=held_out, callbacks=callbacks)  # type: ignore


def losses(run: Trainer) -> dict[float, float]:
    return {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}


@pytest.mark.parametrize(("name", "lora"), PLACES)
def test_what_a_trainer_saves_comes_back(tmp_path: Path, name: str, lora: bool) -> None:
    model, handle = converted(tmp_path, RECIPES[name], lora)
    run = trainer(model, tmp_path / "out", [handle.callback(report=lambda _event: None)])
    run.train()
    expected = logits(model)
    run.save_model()
    for folder in ("out", "final"):
        run.save_model(str(tmp_path / folder))
        got = load(tmp_path / folder)
        assert got.handle is not None and got.handle.configs == handle.configs
        torch.testing.assert_close(logits(got.model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lora", [True, False])
def test_what_a_user_saves_without_handle_or_callback_comes_back(tmp_path: Path, lora: bool) -> None:
    model, _ = converted(tmp_path, RECIPES["spt"], lora)
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "a"))
    save(model, None, tmp_path / "b")
    copy.deepcopy(model).save_pretrained(tmp_path / "c")
    for name in "abc":
        torch.testing.assert_close(logits(load(tmp_path / name).model), expected, rtol=0, atol=1e-5)


def test_an_adapter_of_another_name_has_its_sidecar_beside_it(tmp_path: Path) -> None:
    plain, _ = converted(tmp_path, [FLOOD], lora=False)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(plain, config, adapter_name="mine")
    model.save_pretrained(str(tmp_path / "out"))
    torch.testing.assert_close(logits(load(tmp_path / "out" / "mine").model), logits(model), rtol=0, atol=1e-5)


def test_a_model_that_was_adapted_first_comes_back(tmp_path: Path) -> None:
    runs.llama(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(plain, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    sparsetrain.sparsify(model, FLOOD, calibration=[{"input_ids": ids(4, 1)}])
    model.save_pretrained(str(tmp_path / "out"))
    torch.testing.assert_close(logits(load(tmp_path / "out").model), logits(model), rtol=0, atol=1e-5)


def test_an_adapter_of_transformers_own_comes_back(tmp_path: Path) -> None:
    model, _ = converted(tmp_path, [FLOOD], lora=False)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(load(tmp_path / "out").model), logits(model), rtol=0, atol=1e-5)


def test_an_adapter_that_names_no_task_is_loaded_with_the_class_it_was_made_for(tmp_path: Path) -> None:
    runs.llama(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(plain, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(str(tmp_path / "out"))
    torch.testing.assert_close(logits(load(tmp_path / "out").model), logits(model), rtol=0, atol=1e-5)


def test_a_classifier_with_labels_of_its_own_comes_back(tmp_path: Path) -> None:
    runs.bert(tmp_path / "base")
    options: dict[str, Any] = {"num_labels": 5, "attention_probs_dropout_prob": 0.0}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **options)
    handle = sparsetrain.sparsify(
        model, FLOOD, RoutedFFN(num_blocks=4, num_active=2), calibration=[{"input_ids": ids(4, 1)}]
    )
    config = LoraConfig(
        r=2, target_modules=["query"], modules_to_save=[*handle.modules_to_save, "classifier", "pooler"]
    )
    model = get_peft_model(model, config)
    model.save_pretrained(str(tmp_path / "out"))
    torch.testing.assert_close(logits(load(tmp_path / "out").model), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "lora"), [("flood", True), ("routed", True), ("flood", False), ("2:4", False)])
def test_weights_that_lost_their_sidecar_are_refused(tmp_path: Path, name: str, lora: bool) -> None:
    model, _ = converted(tmp_path, RECIPES[name], lora)
    model.save_pretrained(tmp_path / "out")
    for file in (SIDECAR, STATE):
        (tmp_path / "out" / file).unlink()
    with pytest.raises(CheckpointError, match="would run dense"):
        load(tmp_path / "out")


@pytest.mark.parametrize("lora", [True, False])
def test_a_sidecar_of_an_earlier_save_is_refused(tmp_path: Path, lora: bool) -> None:
    model, handle = converted(tmp_path, [FLOOD], lora)
    model.save_pretrained(tmp_path / "out")
    other, _ = converted(tmp_path, [FLOOD], lora, seed=9)
    other.save_pretrained(tmp_path / "other")
    for file in (SIDECAR, STATE):
        shutil.copyfile(tmp_path / "other" / file, tmp_path / "out" / file)
    with pytest.raises(CheckpointError, match="saved with another sidecar"):
        load(tmp_path / "out")
    handle.restore()
    model.save_pretrained(tmp_path / "out")  # dense weights over sparse ones
    with pytest.raises(CheckpointError, match="saved by a dense model"):
        load(tmp_path / "out")


def test_saving_over_a_folder_of_ours_leaves_no_manifest_that_is_untrue(tmp_path: Path) -> None:
    model, handle = converted(tmp_path, [FLOOD], lora=True)
    save(model, handle, tmp_path / "out")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / MANIFEST).write_text('{"version": 3}')  # a web page's, say
    for parameter in model.parameters():
        parameter.data.add_(0.01)
    for name in ("out", "foreign"):
        model.save_pretrained(tmp_path / name)
    assert json.loads((tmp_path / "foreign" / MANIFEST).read_text()) == {"version": 3}
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_an_upload_in_the_middle_of_a_save_is_refused_and_a_file_is_no_folder(tmp_path: Path) -> None:
    model, _ = converted(tmp_path, [FLOOD], lora=False)
    with pytest.raises(ValueError, match="uploads before the sidecar is written"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)
    (tmp_path / "file").write_text("x")
    model.save_pretrained(tmp_path / "file")  # transformers logs an error
    assert (tmp_path / "file").read_text() == "x"


def test_plain_libraries_read_past_the_mark(tmp_path: Path) -> None:
    model, _ = converted(tmp_path, RECIPES["tokens"], lora=True)
    model.save_pretrained(tmp_path / "adapter")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter"))
    model, _ = converted(tmp_path, [FLOOD], lora=False)
    model.save_pretrained(tmp_path / "model")
    auto: Any = AutoModelForCausalLM
    _, info = auto.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


# ---- going on from checkpoints ----


@pytest.mark.parametrize(("name", "lora"), PLACES)
def test_a_plain_trainer_goes_on_with_the_checkpoints_state_after_another_calibration(
    tmp_path: Path, name: str, lora: bool
) -> None:
    model, handle = converted(tmp_path, RECIPES[name], lora)
    quiet: Any = lambda _event: None  # noqa: E731
    whole = trainer(model, tmp_path / "out", [handle.callback(report=quiet)], save_strategy="steps", save_steps=2)
    whole.train()
    checkpoint = shutil.move(tmp_path / "out" / "checkpoint-2", tmp_path / "moved")
    again, handle = converted(tmp_path, RECIPES[name], lora, seed=9)
    told: list[Any] = []
    rest = trainer(again, tmp_path / "elsewhere", [handle.callback(report=told.append)])
    rest.train(resume_from_checkpoint=str(checkpoint))
    assert losses(rest) == losses(whole)
    if not lora and name in ("flood", "routed"):
        assert any("are those of" in event["text"] for event in told)


@pytest.mark.parametrize(("name", "lora"), PLACES)
@pytest.mark.parametrize("best", ["first", "last"])
def test_the_best_checkpoint_comes_with_its_state(tmp_path: Path, name: str, lora: bool, best: str) -> None:
    if best == "last" and name not in ("late flood", "2:4"):
        pytest.skip("its state does not change in training")
    model, handle = converted(tmp_path, RECIPES[name], lora)

    def metric(_prediction: Any) -> dict[str, float]:
        metric.calls += 1  # type: ignore[attr-defined]
        return {"order": float(metric.calls)}  # type: ignore[attr-defined]

    metric.calls = 0  # type: ignore[attr-defined]
    run = trainer(
        model, tmp_path / "out", [handle.callback(report=lambda _event: None)], steps=4, eval_strategy="steps",
        eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="order", greater_is_better=best == "last",
    )  # fmt: skip
    run.compute_metrics = metric  # type: ignore[assignment]
    run.train()
    chosen = str(run.state.best_model_checkpoint)
    assert chosen.endswith("-2" if best == "first" else "-4")
    expected = logits(model)
    measured = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    assert run.evaluate()["eval_loss"] == pytest.approx(measured[2 if best == "first" else 4], abs=1e-5)
    run.save_model(str(tmp_path / "final"))
    for folder in (chosen, tmp_path / "final"):
        torch.testing.assert_close(logits(load(folder).model), expected, rtol=0, atol=1e-5)


def test_a_checkpoint_of_other_settings_or_of_another_method_is_refused(tmp_path: Path) -> None:
    model, handle = converted(tmp_path, [FLOOD], lora=True)
    trainer(model, tmp_path / "out", [handle.callback()], save_strategy="steps", save_steps=2).train()
    for configs, found in (([LATE_FLOOD], "other settings"), (RECIPES["pq"], "converted with pq_attention")):
        model, handle = converted(tmp_path, configs, lora=False)
        model = adapted(model, handle)
        with pytest.raises(CheckpointError, match=found):
            trainer(model, tmp_path / "out", [handle.callback()]).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_lost_its_sidecar_is_refused_and_a_dense_one_is_said(tmp_path: Path) -> None:
    model, handle = converted(tmp_path, [FLOOD], lora=False)
    trainer(model, tmp_path / "out", [handle.callback()], save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    (checkpoint / SIDECAR).unlink()
    again, handle = converted(tmp_path, [FLOOD], lora=False)
    with pytest.raises(CheckpointError, match="would run dense"):
        trainer(again, tmp_path / "out", [handle.callback()]).train(resume_from_checkpoint=str(checkpoint))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer(dense, tmp_path / "dense", [], save_strategy="steps", save_steps=2).train()
    told: list[Any] = []
    again, handle = converted(tmp_path, [FLOOD], lora=False)
    run = trainer(again, tmp_path / "dense", [handle.callback(report=told.append)])
    run.train(resume_from_checkpoint=str(tmp_path / "dense" / "checkpoint-2"))
    assert "saved by a dense model" in told[0]["text"]


@pytest.mark.parametrize("name", ["routed", "flood", "pq"])
def test_an_adapter_brings_its_patterns_to_a_model_of_another_calibration(tmp_path: Path, name: str) -> None:
    model, _ = converted(tmp_path, RECIPES[name], lora=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path / "out")
    other, handle = converted(tmp_path, RECIPES[name], lora=False, seed=9)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    got = PeftModel.from_pretrained(other, str(tmp_path / "out"))
    torch.testing.assert_close(logits(got), logits(model), rtol=0, atol=1e-5)
    got = got.unload()
    handle.restore()
    for key, tensor in base.state_dict().items():  # what was moved is moved back
        torch.testing.assert_close(got.state_dict()[key], tensor, rtol=0, atol=0)


# ---- a vocabulary that has grown ----

GROWN = {
    "frozen": ([], {}),
    "kept modules": (["embed_tokens", "lm_head"], {}),
    "trained rows": ([], {"trainable_token_indices": {"embed_tokens": [19, 20]}}),
    "one of two rows": ([], {"trainable_token_indices": {"embed_tokens": [20]}}),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", list(GROWN))
def test_an_adapter_brings_the_rows_that_its_base_model_lacks(tmp_path: Path, name: str, tied: bool) -> None:
    runs.llama(tmp_path / "base", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    model.resize_token_embeddings(21)
    handle = sparsetrain.sparsify(model, ROUTED, calibration=[{"input_ids": ids(4, 1)}])
    kept, options = GROWN[name]
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[*handle.modules_to_save, *kept], **options)
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    x = ids(1, 5)
    x[0, :4] = torch.tensor([19, 20, 19, 20])
    expected = logits(model, x)
    save(model, handle, tmp_path / "saved", base_model=str(tmp_path / "base"))
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(str(tmp_path / "plain"))  # PEFT says that it saves the embeddings too
    for folder in ("saved", "plain"):
        torch.testing.assert_close(logits(load(tmp_path / folder).model, x), expected, rtol=0, atol=1e-5)
    export(tmp_path / "saved", tmp_path / "whole")
    torch.testing.assert_close(logits(load(tmp_path / "whole").model, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [21, 17])
def test_a_dense_adapter_and_a_whole_model_bring_their_vocabulary(tmp_path: Path, rows: int) -> None:
    runs.llama(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(rows)
    x = ids(1, 5).clamp(max=rows - 1)
    save(model, None, tmp_path / "whole")
    torch.testing.assert_close(logits(load(tmp_path / "whole").model, x), logits(model, x))
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    save(model, None, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    assert read_sidecar(tmp_path / "adapter")["vocabulary"] == rows
    torch.testing.assert_close(logits(load(tmp_path / "adapter").model, x), logits(model, x))


def test_a_masked_language_model_brings_its_rows_and_their_bias(tmp_path: Path) -> None:
    runs.bert(tmp_path / "base")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "base", attention_probs_dropout_prob=0.0)
    model.resize_token_embeddings(22)
    model.get_output_embeddings().bias.data[-3:] = torch.tensor([1.0, 2.0, 3.0])
    sparsetrain.sparsify(model, RoutedFFN(num_blocks=4, num_active=2))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], modules_to_save=["router"]))
    x = ids(1, 5)
    x[0, 0] = 21
    save(model, None, tmp_path / "saved", base_model=str(tmp_path / "base"))
    torch.testing.assert_close(logits(load(tmp_path / "saved").model, x), logits(model, x), rtol=0, atol=1e-5)


def test_rows_on_another_base_model_and_an_adapter_that_does_not_fit_are_refused(tmp_path: Path) -> None:
    runs.llama(tmp_path / "base")
    runs.llama(tmp_path / "smaller", vocab_size=11)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(21)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = get_peft_model(model, config)
    save(model, None, tmp_path / "saved", base_model=str(tmp_path / "base"))
    (tmp_path / "saved" / MANIFEST).unlink()
    about = json.loads((tmp_path / "saved" / SIDECAR).read_text())
    for changed, found in (
        ({"base_model": str(tmp_path / "smaller")}, "21 embedding rows, its base model has 11, and 2 were saved"),
        ({"vocabulary": 10**12}, "vocabulary"),
        ({"vocabulary": True}, "vocabulary"),
    ):
        (tmp_path / "saved" / SIDECAR).write_text(json.dumps(about | changed))
        with pytest.raises(CheckpointError, match=found):
            load(tmp_path / "saved")
    (tmp_path / "saved" / SIDECAR).unlink()
    with pytest.raises(CheckpointError, match=r"does not fit its base model: .*size mismatch"):
        load(tmp_path / "saved")
