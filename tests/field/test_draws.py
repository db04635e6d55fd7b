"""What a draw depends on: seed, step, and the document's own tokens. Not padding, neighbours, order or packing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparsetrain
from sparsetrain import TokenSelection
from sparsetrain.methods.token_selection.policies import Batch, draw
from tests.families import FAMILIES
from tests.methods.test_token_selection import selector_of

CHOICES = [
    TokenSelection(keep_ratio=0.4),
    TokenSelection(pool="targets", keep_ratio=0.4),
    TokenSelection(pool="targets", keep_ratio=0.8, keep_all_targets=True, context="near"),
    TokenSelection.paper(keep_ratio=0.3),
    TokenSelection(num_tokens=16),
]
LENGTHS = (12, 7, 9)


def document(length: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 61, (1, length), generator=torch.Generator().manual_seed(length))
    labels = ids.clone()
    labels[:, : length // 3] = -100
    return {"input_ids": ids, "labels": labels}


def chosen(config: TokenSelection, batch: dict[str, Tensor], step: int = 5, **more: Any) -> list[list[int]]:
    return draw(config, Batch.of(batch, causal=True, **more), step=step).positions


def padded(side: str, width: int, lengths: tuple[int, ...] = LENGTHS, pad: int = 0) -> tuple[dict[str, Tensor], list]:
    """A batch of documents, and where each starts."""
    shape = (len(lengths), width)
    batch = {
        "input_ids": torch.full(shape, pad),
        "labels": torch.full(shape, -100),
        "attention_mask": torch.zeros(shape),
    }
    starts = [width - n if side == "left" else 0 for n in lengths]
    for row, (n, start) in enumerate(zip(lengths, starts, strict=True)):
        for name, x in document(n).items():
            batch[name][row, start : start + n] = x[0]
        batch["attention_mask"][row, start : start + n] = 1
    return batch, starts


@pytest.mark.parametrize("config", CHOICES, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("width", [12, 16, 40])
def test_padding_and_neighbours_change_nothing(config: TokenSelection, side: str, width: int) -> None:
    alone = [chosen(config, document(n))[0] for n in LENGTHS]
    batch, starts = padded(side, width)
    for mask in (batch["attention_mask"].long(), batch["attention_mask"].bool()):
        found = chosen(config, {**batch, "attention_mask": mask})
        assert [[p - start for p in row] for row, start in zip(found, starts, strict=True)] == alone
    square = batch["attention_mask"].bool()[:, None, None].expand(-1, 1, width, -1).tril()
    assert chosen(config, {**batch, "attention_mask": square}) == found
    # no mask: what ends or begins a row with the padding token and no label is padding
    found = chosen(config, {n: batch[n] for n in ("input_ids", "labels")}, pad=0)
    assert [[p - start for p in row] for row, start in zip(found, starts, strict=True)] == alone
    order = torch.tensor([2, 0, 1])
    assert chosen(config, {n: x[order] for n, x in batch.items()}) == [found[i] for i in order]
    assert chosen(config, {n: x.int() if n == "input_ids" else x for n, x in batch.items()}) == found


@pytest.mark.parametrize("config", CHOICES, ids=str)
@pytest.mark.parametrize("way", ["position_ids", "mask"])
def test_packed_documents_are_drawn_as_if_alone(config: TokenSelection, way: str) -> None:
    parts = [document(n) for n in LENGTHS]
    packed = {n: torch.cat([part[n] for part in parts], 1) for n in parts[0]}
    starts = [sum(LENGTHS[:i]) for i in range(3)]
    packed["labels"][:, starts] = -100
    if way == "mask":
        packed["attention_mask"] = torch.cat([torch.full((1, n), i + 1) for i, n in enumerate(LENGTHS)], 1)
    else:
        packed["position_ids"] = torch.cat([torch.arange(n)[None] for n in LENGTHS], 1)
        if config.pool == "all":  # padding after the documents, with a mask
            width = (0, 4)
            packed = {
                n: torch.nn.functional.pad(x, width, value=-100 if n == "labels" else 0) for n, x in packed.items()
            }
            packed["attention_mask"] = (torch.arange(packed["labels"].shape[1]) < sum(LENGTHS))[None].long()
    expected = [p + start for n, start in zip(LENGTHS, starts, strict=True) for p in chosen(config, document(n))[0]]
    assert chosen(config, packed) == [expected]


def test_short_samples_are_taken_whole() -> None:
    batch, _ = padded("right", 12)
    for config in (TokenSelection(num_tokens=16), TokenSelection.paper(num_tokens=16)):
        assert [len(row) for row in chosen(config, batch)] == list(LENGTHS)
    assert [len(row) for row in chosen(TokenSelection(num_tokens=8), batch)] == [8, 7, 8]
    assert [len(row) for row in chosen(TokenSelection.paper(num_tokens=6), batch)] == [8, 7, 8]
    one = {"input_ids": torch.tensor([[5]]), "labels": torch.tensor([[5]])}
    for config in (*CHOICES, TokenSelection(always_keep=("first", "last"))):
        assert chosen(config, one) == [[0]]
    model = FAMILIES["llama"].model().train()
    sparsetrain.sparsify(model, TokenSelection(num_tokens=200))
    model(**FAMILIES["llama"].batch(), labels=FAMILIES["llama"].batch()["input_ids"]).loss.backward()
    assert selector_of(model).rows.everything


def test_a_row_of_padding_alone_selects_nothing_and_costs_nothing() -> None:
    case = FAMILIES["llama"]
    model, batch = case.model().train(), case.batch(3, 20)
    sparsetrain.sparsify(model, TokenSelection())
    batch["labels"] = batch["input_ids"].clone()
    expected = model(**{n: x[:2] for n, x in batch.items()}).loss
    batch["attention_mask"][2], batch["labels"][2] = 0, -100
    torch.testing.assert_close(model(**batch).loss, expected)
    assert selector_of(model).rows.positions[2] == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mistral", "gemma3"])
def test_loss_and_gradients_of_a_padded_batch_are_those_of_its_samples(family: str) -> None:
    """Through the model: the same selection, the same numbers, however the batch is put together."""
    case = FAMILIES[family]
    batch, _ = padded("right", 16)
    batch["attention_mask"] = batch["attention_mask"].long()
    results = []
    for rows in (((0, 1, 2), 16), ((2, 0, 1), 12)):
        model = case.model().train()
        sparsetrain.sparsify(model, TokenSelection(keep_ratio=0.5))
        loss = model(**{n: x[list(rows[0]), : rows[1]] for n, x in batch.items()}).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_embedded_tokens_and_images_train_in_every_family(family: str) -> None:
    case = FAMILIES[family]
    model, batch = case.model().train(), case.batch()
    if not case.vision:
        embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach()
        batch["inputs_embeds"] = embedded.requires_grad_()
    handle = sparsetrain.sparsify(model, TokenSelection())
    first = None
    for given in (batch, {n: x for n, x in batch.items() if n != "attention_mask"}):
        out = model(**given)
        out.logits.square().mean().backward()
        rows = selector_of(model).rows
        first = first or rows.positions
        assert rows.positions == first and 0 < sum(rows.counts) < 0.5 * len(rows.counts) * rows.num_tokens
    handle.step(1)
    model(**batch)
    assert selector_of(model).rows.positions != first
    if not case.vision:
        touched = embedded.grad.abs().sum(-1) > 0
        assert touched.any() and not touched.all()
    if case.causal:
        assert torch.isfinite(model(**batch, labels=torch.randint(3, 61, (2, 100))).loss)
