"""Token selection's loss is one mean over the selected targets of an optimizer step, however the step is cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import SequentialSampler
from transformers import (
    BertForMaskedLM,
    BertForTokenClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import sparsetrain
from sparsetrain import TokenSelection
from tests.families import FAMILIES
from tests.hf.test_trl import tokenizer
from tests.methods.test_token_selection import selector_of

POLICIES: dict[str, TokenSelection] = {
    "all": TokenSelection(),
    "targets": TokenSelection(pool="targets"),
    "prefix": TokenSelection(policy="prefix"),
    "loss": TokenSelection(policy="loss"),
    "gradient_norm": TokenSelection(policy="gradient_norm"),
    "unbiased": TokenSelection(unbiased=True),
    "paper": TokenSelection.paper(keep_ratio=0.1),
    "everything": TokenSelection(keep_ratio=1.0),
}
TARGETS = (3, 10, 30, 55)


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def some_rows(targets: tuple[int, ...] = TARGETS, tokens: int = 60) -> list[dict[str, Tensor]]:
    """Rows that differ in their share of targets; the last of them padded."""
    rows = []
    for seed, count in enumerate(targets):
        ids = FAMILIES["llama"].batch(1, tokens, seed + 1)["input_ids"][0]
        labels = ids.clone()
        labels[: tokens - count] = -100
        mask = torch.ones_like(ids)
        if seed % 2:
            ids[tokens - 5 :], labels[tokens - 5 :], mask[tokens - 5 :] = 0, -100, 0
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return rows


class Gradients(TrainerCallback):
    """The first step's gradients, as the optimizer finds them."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        named = given["model"].named_parameters()
        self.found = {n: p.grad.clone() for n, p in named if p.grad is not None}


class InOrder(Trainer):
    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def step(
    model: Any, config: TokenSelection | None, folder: Path, per_batch: int, rows: list[Any], **options: Any
) -> tuple[float, dict[str, Tensor], Any]:
    """(logged loss, gradients, trainer) of one optimizer step over all rows."""
    callbacks: list[Any] = [Gradients()]
    if config is not None:
        callbacks.append(sparsetrain.sparsify(model, config).callback(at_end=False))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=per_batch, learning_rate=0.0, use_cpu=True,
        gradient_accumulation_steps=len(rows) // per_batch, logging_steps=1, report_to="none", disable_tqdm=True,
        save_strategy="no", max_grad_norm=0.0, **options,
    )  # fmt: skip
    trainer = InOrder(model=model, args=arguments, train_dataset=rows, callbacks=callbacks)  # type: ignore[arg-type]
    trainer.train()
    return trainer.state.log_history[0]["loss"], callbacks[0].found, trainer


def assert_equal(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("policy", POLICIES)
def test_micro_batches_equal_one_batch(policy: str, tmp_path: Path) -> None:
    config, rows = POLICIES[policy], some_rows()
    whole = step(FAMILIES["llama"].model(), config, tmp_path, 4, rows)
    for per_batch in (1, 2):
        assert_equal(step(FAMILIES["llama"].model(), config, tmp_path, per_batch, rows), whole)
    if policy == "everything":
        assert_equal(whole, step(FAMILIES["llama"].model(), None, tmp_path, 4, rows))


def test_the_loss_is_that_of_the_selected_targets(tmp_path: Path) -> None:
    model, rows = FAMILIES["llama"].model(), some_rows()
    loss = step(model, TokenSelection(), tmp_path, 1, rows)[0]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    sparsetrain.sparsify(twin := FAMILIES["llama"].model().train(), TokenSelection())
    twin(**batch)
    here = selector_of(twin).rows.selected_bt
    with torch.no_grad():
        logits = twin.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    target = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    assert loss == pytest.approx(float(F.cross_entropy(logits[here], target[here])), rel=1e-5)


def test_a_micro_batch_without_selected_targets_counts_for_nothing(tmp_path: Path) -> None:
    """The published preset ensures no target; whichever micro-batch has none, the others' mean is the step's."""
    config = TokenSelection.paper(num_tokens=4)
    for targets in ((1, 55, 50, 1), (55, 1, 1, 50), (1, 1, 1, 55)):
        rows = some_rows(targets)
        whole = step(FAMILIES["llama"].model(), config, tmp_path, 4, rows)
        assert whole[0] > 1
        assert_equal(step(FAMILIES["llama"].model(), config, tmp_path, 1, rows), whole)


def adapted_head() -> Any:
    torch.manual_seed(0)
    return get_peft_model(
        FAMILIES["llama"].model(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )


def soft_prompt() -> Any:
    torch.manual_seed(0)
    return get_peft_model(FAMILIES["llama"].model(), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))


def soft_cap() -> Any:
    model = FAMILIES["gemma3"].model()
    model.config.final_logit_softcapping = 3.0
    return model


def smoothed() -> Any:
    model = FAMILIES["llama"].model()

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, **_: Any) -> Tensor:
        target = F.pad(labels[:, 1:], (0, 1), value=-100)
        total = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum", label_smoothing=0.1)
        return total / num_items_in_batch

    model.loss_function = loss
    return model


def masked_lm() -> Any:
    torch.manual_seed(0)
    return BertForMaskedLM(FAMILIES["bert"].model().config)


def tagger() -> Any:
    config = FAMILIES["bert"].model().config
    config.num_labels = 61
    torch.manual_seed(0)
    return BertForTokenClassification(config)


@pytest.mark.parametrize(
    "build", [adapted_head, soft_prompt, soft_cap, smoothed, masked_lm, tagger], ids=lambda f: f.__name__
)
def test_so_it_is_for_heads_and_losses_that_are_the_models_own(build: Any, tmp_path: Path) -> None:
    rows = some_rows()
    whole = step(build(), TokenSelection(), tmp_path, 4, rows)
    assert_equal(step(build(), TokenSelection(), tmp_path, 1, rows), whole)
    everything = step(build(), TokenSelection(keep_ratio=1.0), tmp_path, 4, rows)
    assert everything[0] == pytest.approx(step(build(), None, tmp_path, 4, rows)[0], rel=1e-5)


@pytest.mark.parametrize("build", [adapted_head, soft_cap, masked_lm, tagger], ids=lambda f: f.__name__)
@pytest.mark.parametrize("total", [None, 5])
def test_without_a_target_the_loss_is_a_finite_zero(build: Any, total: int | None) -> None:
    model = build().train()
    sparsetrain.sparsify(model, TokenSelection())
    batch = FAMILIES["llama"].batch()
    more = {} if total is None else {"num_items_in_batch": torch.tensor(total)}
    loss = model(**batch, labels=torch.full_like(batch["input_ids"], -100), **more).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert loss == 0 and gradients and not any(g.any() for g in gradients)
    gradients.clear()
    model.zero_grad()
    model(**batch, labels=batch["input_ids"], **more).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_ones_own_loop(scale: float, set_to_none: bool, tmp_path: Path) -> None:
    """`num_items_in_batch` is all it takes, also under a gradient scaler; forwards that are thrown away count for
    nothing; a step begins where gradients are gone, or where `handle.step` says so."""
    rows = some_rows()
    whole, expected, _ = step(FAMILIES["llama"].model(), TokenSelection(), tmp_path, 4, rows)
    total = sum((row["labels"][1:] != -100).sum() for row in rows)
    model = FAMILIES["llama"].model().train()
    handle = sparsetrain.sparsify(model, TokenSelection())
    for _ in range(2):
        losses = []
        for row in rows:
            given = {n: x[None] for n, x in row.items()} | {"num_items_in_batch": total}
            model(**given)
            loss = model(**given).loss
            (scale * loss).backward()
            losses.append(float(loss.detach()))
        assert sum(losses) == pytest.approx(whole, rel=1e-5)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad / scale, expected[name], rtol=1e-4, atol=1e-6)
        model.zero_grad(set_to_none=set_to_none)
        handle.step(7)
        handle.step(0)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("policy", ["all", "targets", "prefix", "paper"])
def test_sft_micro_batches_equal_one_batch(policy: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    ids = [FAMILIES["llama"].batch(1, n, n)["input_ids"][0].tolist() for n in (20, 31, 44, 60)]
    masks = [[0] * (len(x) - n) + [1] * n for x, n in zip(ids, (2, 9, 30, 58), strict=True)]
    data = Dataset.from_dict({"input_ids": ids, "completion_mask": masks})

    class Ordered(trl.SFTTrainer):  # type: ignore[name-defined,misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    found = []
    for per_batch in (4, 1, 2):
        model, gradients = FAMILIES["llama"].model(), Gradients()
        handle = sparsetrain.sparsify(model, POLICIES[policy])
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=per_batch, learning_rate=0.0,
            gradient_accumulation_steps=4 // per_batch, logging_steps=1, report_to=[], use_cpu=True, bf16=False,
            max_grad_norm=0.0, save_strategy="no", disable_tqdm=True, completion_only_loss=True,
        )  # fmt: skip
        trainer = Ordered(
            model=model, args=arguments, train_dataset=data, processing_class=tokenizer(),
            callbacks=[gradients, handle.callback(at_end=False)],
        )  # fmt: skip
        trainer.train()
        found.append((trainer.state.log_history[0]["loss"], gradients.found))
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])
