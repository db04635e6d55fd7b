"""Losses that others compute beside token selection: from logits of all rows, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertForMaskedLM, Trainer, TrainingArguments

import sparsetrain
from sparsetrain import TokenSelection
from tests.families import FAMILIES
from tests.methods.test_token_selection import cut_by_hooks, selector_of


def batch_of(rows: int = 2, tokens: int = 40) -> dict[str, Tensor]:
    ids = FAMILIES["llama"].batch(rows, tokens)["input_ids"]
    labels = ids.clone()
    labels[:, :9] = -100
    return {"input_ids": ids, "labels": labels}


def mean_of_all(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits, target = outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    total = F.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
    return total / (num_items_in_batch or (target != -100).sum())


class OwnTrainer(Trainer):
    """As many a script has it: the model is given its labels, and the loss is made of its logits."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = mean_of_all(outputs, inputs["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def first_loss(config: TokenSelection | None, folder: Path, kind: Any = Trainer, **options: Any) -> float:
    model = FAMILIES["llama"].model()
    callbacks = [] if config is None else [sparsetrain.sparsify(model, config).callback(at_end=False)]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=2, logging_steps=1, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="no",
        label_smoothing_factor=options.pop("smoothing", 0.0),
    )  # fmt: skip
    rows = [{n: x[i] for n, x in batch_of().items()} for i in range(2)]
    trainer = kind(model=model, args=arguments, train_dataset=rows, callbacks=callbacks, **options)
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def test_a_trainer_that_keeps_the_labels_is_refused_unless_everything_is_selected(tmp_path: Path) -> None:
    dense = first_loss(None, tmp_path, compute_loss_func=mean_of_all)
    all_of_it = first_loss(TokenSelection(keep_ratio=1.0), tmp_path, compute_loss_func=mean_of_all)
    assert all_of_it == pytest.approx(dense, rel=1e-6)
    with pytest.raises(ValueError, match=r"token_selection.*compute_loss_func"):
        first_loss(TokenSelection(), tmp_path, compute_loss_func=mean_of_all)
    with pytest.raises(ValueError, match=r"token_selection.*label_smoothing_factor"):
        first_loss(TokenSelection(), tmp_path, smoothing=0.1)


def test_a_loss_of_ones_own_reads_logits_of_all_rows(tmp_path: Path) -> None:
    dense = first_loss(None, tmp_path, OwnTrainer)
    for config in (TokenSelection(keep_ratio=1.0), TokenSelection(), TokenSelection.paper(keep_ratio=0.1)):
        assert first_loss(config, tmp_path, OwnTrainer) == pytest.approx(dense, rel=1e-5)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("return_dict", [True, False])
def test_logits_of_all_rows_with_gradient_through_selected_ones(labelled: bool, return_dict: bool) -> None:
    model, batch = FAMILIES["llama"].model().double().train(), batch_of()
    weight = torch.randn(2, 40, 61, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    handle = sparsetrain.sparsify(model, TokenSelection())
    given = batch if labelled else {"input_ids": batch["input_ids"]}
    out = model(**given, return_dict=return_dict, use_cache=False)
    logits = (out.logits if return_dict else out[int(labelled)]) * weight
    logits.sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    rows = selector_of(model).rows
    model.zero_grad()
    handle.restore()
    with cut_by_hooks(model, rows.selected_bt):
        dense = model(input_ids=batch["input_ids"]).logits
    (dense * weight)[rows.selected_bt].sum().backward()
    torch.testing.assert_close(logits.detach(), (dense * weight).detach())
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-8, atol=1e-10)


def test_logits_on_demand_are_as_good_as_a_tensor() -> None:
    model, batch = FAMILIES["llama"].model().train(), batch_of()
    sparsetrain.sparsify(model, TokenSelection())
    with torch.no_grad():
        expected = model(**batch).logits
    out = model(**batch)
    logits = out["logits"]
    assert logits.shape == (2, 40, 61) and len(logits) == 2 and logits.requires_grad and logits.dtype == torch.float32
    for found in (
        logits.float(),
        logits + 0,
        0 + logits,
        2 - (2 - logits),
        torch.cat([logits]),
        torch.stack([*logits]),
    ):
        torch.testing.assert_close(found, expected)
    assert (logits.argmax(-1) == expected.argmax(-1)).all() and (logits == logits.tensor()).all()
    assert bool((logits[:, 1:] == logits.tensor()[:, 1:]).all()) and (logits.detach() <= expected + 1).all()
    F.cross_entropy(logits.transpose(1, 2), batch["labels"]).backward()
    head: nn.Module = model.lm_head
    assert head.weight.grad is not None and isinstance(out.to_tuple()[0], Tensor)


def test_masked_language_models_hand_on_logits_of_all_rows() -> None:
    torch.manual_seed(0)
    model: Any = BertForMaskedLM(FAMILIES["bert"].model().config).train()
    batch = FAMILIES["bert"].batch()
    expected = model(**batch).logits
    sparsetrain.sparsify(model, TokenSelection())
    labels = batch["input_ids"].where(batch["input_ids"] % 3 == 0, -100)
    torch.testing.assert_close(model(**batch, labels=labels).logits.tensor(), expected)


@pytest.mark.parametrize("accumulated", [False, True])
def test_shifted_labels_mean_what_they_say(accumulated: bool) -> None:
    """Collators for packed rows bring labels that stand where they are predicted."""
    model, batch = FAMILIES["llama"].model().train(), batch_of()
    handle = sparsetrain.sparsify(model, TokenSelection(pool="targets", keep_ratio=0.4))
    more = {"num_items_in_batch": torch.tensor(60)} if accumulated else {}
    expected = model(**batch, **more).loss
    chosen = selector_of(model).rows.positions
    shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(**batch, shift_labels=shifted, **more).loss, expected)
    assert selector_of(model).rows.positions == chosen
    other = torch.full_like(shifted, -100)
    other[:, 3:6] = shifted[:, 12:15]  # not the labels moved by one: these win
    found = model(**batch, shift_labels=other).loss
    here = selector_of(model).rows.selected_bt
    assert here[:, 3:6].all()
    handle.restore()
    logits = model(input_ids=batch["input_ids"]).logits
    torch.testing.assert_close(found, F.cross_entropy(logits[:, 3:6].flatten(0, 1), other[:, 3:6].flatten()))


def test_a_loss_function_that_was_set_on_the_model_is_used() -> None:
    model, batch = FAMILIES["llama"].model().train(), batch_of()
    seen: list[tuple[int, ...]] = []

    def squared(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
        seen.append((*logits.shape, int((labels != -100).sum())))
        return logits.square().mean()

    model.loss_function = squared
    sparsetrain.sparsify(model, TokenSelection())
    model(**batch).loss.backward()
    assert len(seen) == 1 and seen[0][:3] == (2, 40, 61) and 0 < seen[0][3] < 62
