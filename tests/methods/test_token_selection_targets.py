"""Which tokens are selected, and the loss of those that have labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import sparsetrain
from sparsetrain.methods.token_selection import TokenSelection
from sparsetrain.methods.token_selection.policies import Batch, draw
from tests.families import FAMILIES
from tests.methods.test_token_selection import assert_same, cut_by_hooks, doubled, exact, selector_of


@pytest.mark.parametrize("prompt", [0, 40])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3"])
def test_the_loss_of_selected_targets_equals_that_of_masked_labels(family: str, prompt: int) -> None:
    case = FAMILIES[family]
    model, batch = doubled(case)
    handle = sparsetrain.sparsify(model, TokenSelection())
    labels = batch["input_ids"].clone()
    labels[:, :prompt] = -100
    loss = model(**batch, labels=labels).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    rows = selector_of(model).rows
    model.zero_grad()
    handle.restore()
    with cut_by_hooks(model, rows.selected_bt):
        logits = model(**batch).logits
    target = F.pad(labels[:, 1:], (0, 1), value=-100)[rows.selected_bt]
    expected = F.cross_entropy(logits[rows.selected_bt], target, ignore_index=-100)
    expected.backward()
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-6, atol=1e-6)
    assert (target != -100).any()
    for name, p in model.named_parameters():
        if p.grad is not None and name in found:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-5, atol=1e-7)
    assert "forward" not in vars(model.get_output_embeddings()) and "_loss_function" not in vars(model)


def test_a_batch_without_targets_has_zero_loss_and_evaluation_sees_all_labels() -> None:
    case = FAMILIES["llama"]
    model, batch = case.model().train(), case.batch()
    handle = sparsetrain.sparsify(model, TokenSelection())
    loss = model(**batch, labels=torch.full_like(batch["input_ids"], -100)).loss
    loss.backward()
    assert loss == 0 and not any(p.grad is not None and p.grad.any() for p in model.parameters())
    model.eval()
    labelled = batch | {"labels": batch["input_ids"]}
    found = model(**labelled).loss
    handle.restore()
    assert found == model(**labelled).loss


def test_accumulated_micro_batches_weigh_as_their_targets() -> None:
    case = FAMILIES["llama"]
    model, batch = case.model().train(), case.batch(2)
    labels = batch["input_ids"].clone()
    labels[0, :60] = -100
    sparsetrain.sparsify(model, TokenSelection(pool="targets", keep_ratio=0.2))
    losses, counts = [], []
    for i in range(2):
        one = {n: x[i : i + 1] for n, x in batch.items()} | {"labels": labels[i : i + 1]}
        losses.append(model(**one, num_items_in_batch=torch.tensor(139)).loss)
        counts.append(model(**one).loss)
    assert [round(139 * float(a.detach() / m.detach())) for a, m in zip(losses, counts)] == [40, 99]


def test_targets_come_first_and_one_is_ensured() -> None:
    ids = torch.randint(3, 60, (1, 50), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[0, 45:] = ids[0, 45:]
    batch = Batch.of({"input_ids": ids, "labels": labels}, causal=True)
    assert batch.targets_bt is not None and batch.targets_bt[0].nonzero().flatten().tolist() == [44, 45, 46, 47, 48]
    rows = draw(TokenSelection(pool="targets", num_tokens=10), batch, step=0)
    assert {0, 44, 45, 46, 47, 48} <= set(rows.index_bk[0].tolist())
    for step in range(20):
        rows = draw(TokenSelection(num_tokens=2), batch, step=step)
        assert rows.counts == (2,) and rows.index_bk[0, 0] == 0 and 44 <= rows.index_bk[0, 1] <= 48
    rows = draw(TokenSelection.paper(keep_ratio=0.25), batch, step=0)
    assert rows.counts == (14,) and {0, 49} <= set(rows.index_bk[0].tolist())
    rows = draw(TokenSelection(policy="prefix", num_tokens=7, ensure_target=False), batch, step=0)
    assert rows.index_bk[0].tolist() == list(range(7))


def test_all_targets_are_kept_and_context_fills_up() -> None:
    ids = torch.randint(3, 60, (3, 50), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[0, 20:45], labels[1, 47:], labels[2, 10:12], labels[2, 30:32] = 1, 1, 1, 1
    batch = Batch.of({"input_ids": ids, "labels": labels}, causal=True)

    def chosen(**options: Any) -> list[list[int]]:
        return draw(TokenSelection(pool="targets", num_tokens=8, **options), batch, step=0).positions

    assert [len(row) for row in chosen()] == [8, 8, 8]
    assert [len(row) for row in chosen(policy="prefix", keep_all_targets=True)] == [26, 8, 8]
    near = chosen(keep_all_targets=True, context="near")
    # a causal model's targets see what stands before them: 45 to 49 of the first row send nothing to a loss
    assert near[0] == [0, *range(19, 44)] and near[1] == [0, *range(42, 49)]
    assert near[2] == [0, 7, 8, 9, 10, 28, 29, 30]
    loose = chosen(keep_all_targets=True)
    assert loose[0] == near[0] and set(loose[1]) >= {0, 46, 47, 48} and loose[1] != near[1]
    masked = Batch.of({"input_ids": ids, "labels": labels}, causal=False)
    rows = draw(TokenSelection(pool="targets", num_tokens=8, keep_all_targets=True, context="near"), masked, step=0)
    assert rows.positions[2] == [0, 9, 10, 11, 12, 29, 30, 31]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("context", ["random", "near"])
@pytest.mark.parametrize("counted", [False, True])
def test_with_all_targets_the_loss_is_the_dense_one_and_gradients_meet_the_definition(
    family: str, context: str, counted: bool
) -> None:
    case = FAMILIES[family]
    model, batch = doubled(case)
    labels = batch["input_ids"].clone()
    labels[0, :30], labels[1, :95] = -100, -100  # 70 and 5 targets
    given = batch | {"labels": labels} | ({"num_items_in_batch": torch.tensor(75)} if counted else {})
    target = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    dense = F.cross_entropy(model(**batch).logits.flatten(0, 1), target).detach()
    handle = sparsetrain.sparsify(
        model, TokenSelection(num_tokens=15, pool="targets", keep_all_targets=True, context=context)
    )
    loss = model(**given).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    rows = selector_of(model).rows
    assert rows.counts == (71, 15)
    torch.testing.assert_close(loss.detach(), dense, rtol=1e-12, atol=0)
    model.zero_grad()
    handle.restore()
    with cut_by_hooks(model, rows.selected_bt):
        logits = model(**batch).logits
    F.cross_entropy(logits.flatten(0, 1), target).backward()
    assert_same(found, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, exact(family))


def test_ragged_micro_batches_accumulate_to_the_dense_loss_when_all_targets_are_kept() -> None:
    case = FAMILIES["llama"]
    model, batch = doubled(case)
    labels = batch["input_ids"].clone()
    labels[0, :40], labels[1, :90] = -100, -100
    target = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    dense = F.cross_entropy(model(**batch).logits.flatten(0, 1), target).detach()
    sparsetrain.sparsify(model, TokenSelection(num_tokens=8, pool="targets", keep_all_targets=True))
    total = sum(
        model(**{n: x[i : i + 1] for n, x in batch.items()}, labels=labels[i : i + 1], num_items_in_batch=70).loss
        for i in range(2)
    )
    torch.testing.assert_close(total.detach(), dense, rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", [{}, {"policy": "loss"}, {"unbiased": True}, {"pool": "targets"}], ids=str)
def test_steps_of_a_dense_phase_train_on_all_tokens_without_whole_logits(options: dict[str, Any]) -> None:
    case = FAMILIES["llama"]
    model, batch = doubled(case)
    labels = batch["input_ids"].clone()
    labels[0, :40] = -100
    target = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    dense = F.cross_entropy(model(**batch).logits.flatten(0, 1), target)
    dense.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    phases = sparsetrain.DeployDense(dense_first=0.2, dense_last=0.3)
    handle = sparsetrain.sparsify(model, TokenSelection(**options), deploy=phases)
    everything = []
    for step in range(10):
        handle.step(step, 10)
        model.zero_grad()
        out = model(**batch, labels=labels, num_items_in_batch=torch.tensor(int((target != -100).sum())))
        out.loss.backward()
        everything.append(selector_of(model).rows.everything)
        if everything[-1]:
            torch.testing.assert_close(out.loss.detach(), dense.detach(), rtol=1e-12, atol=0)
            assert_same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)
            assert not isinstance(out["logits"], torch.Tensor)  # computed if somebody reads them
    assert everything == [True] * 2 + [False] * 5 + [True] * 3


def test_what_tells_targets_from_context_needs_the_pool_of_targets() -> None:
    for wrong in ({"keep_all_targets": True}, {"context": "near"}, {"context": "near", "pool": "scored"}):
        with pytest.raises(ValueError, match="pool='targets'"):
            TokenSelection(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="keeps them all"):
        TokenSelection(pool="targets", keep_all_targets=True, policy="loss")
    with pytest.raises(ValueError, match="unknown"):
        TokenSelection(pool="targets", context="nearest")


def test_scores_choose_and_are_checked() -> None:
    ids = torch.zeros(1, 10, dtype=torch.int64)
    scores = torch.tensor([[0.0, 5, 1, 9, 2, 2, 2, 2, 8, 0]])
    for config in (TokenSelection(pool="scored", num_tokens=4), TokenSelection(policy="loss", num_tokens=4)):
        rows = draw(config, Batch.of({"input_ids": ids, "token_scores": scores}, causal=True), step=0)
        assert rows.index_bk[0].tolist() == [0, 1, 3, 8]
        with pytest.raises(ValueError, match="token_scores"):
            draw(config, Batch.of({"input_ids": ids}, causal=True), step=0)
    for wrong in (scores[:, :5], scores * float("nan")):
        with pytest.raises(ValueError, match="one number a token"):
            Batch.of({"input_ids": ids, "token_scores": wrong}, causal=True)


def test_padding_and_documents_are_drawn_from_separately() -> None:
    ids = torch.randint(3, 60, (2, 40))
    mask = torch.ones_like(ids)
    mask[1, :10] = 0
    positions = torch.cat([torch.arange(16), torch.arange(24)])[None].expand(2, -1)
    packed = Batch.of({"input_ids": ids[:1], "position_ids": positions[:1]}, causal=True)
    rows = draw(TokenSelection(keep_ratio=0.25), packed, step=0)
    chosen = rows.index_bk[0]
    assert rows.counts == (10,) and (chosen < 16).sum() == 4 and {0, 16} <= set(chosen.tolist())
    rows = draw(
        TokenSelection(keep_ratio=0.25), Batch.of({"input_ids": ids, "attention_mask": mask}, causal=True), step=0
    )
    assert rows.counts == (10, 8) and rows.index_bk[1, 0] == 10


def test_inclusion_is_uniform_and_weights_make_it_unbiased() -> None:
    ids = torch.randint(3, 60, (1, 21))
    batch = Batch.of({"input_ids": ids, "labels": ids}, causal=True)
    config = TokenSelection(num_tokens=6, unbiased=True)
    counts, total = torch.zeros(21), torch.zeros(21)
    for step in range(2000):
        rows = draw(config, batch, step=step)
        counts[rows.index_bk[0]] += 1
        assert rows.weight_bk is not None
        total[rows.index_bk[0]] += rows.weight_bk[0]
    assert counts[0] == 2000
    expected = 2000 * 5 / 20
    assert ((counts[1:] - expected) ** 2 / expected).sum() < 38.6  # chi-square, 19 degrees of freedom, 0.5 %
    torch.testing.assert_close(total / 2000, torch.ones(21), rtol=0.15, atol=0)
