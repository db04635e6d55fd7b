"""Padded and packed batches: a converted model at its dense limit is the plain one on every row, and rows are alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsetrain import FloodFillAttention, PQAttention, RoutedFFN, TokenSelection, sparsify
from sparsetrain.core.config import MethodConfig
from tests.families import FAMILIES, Family

TEXT = [name for name, case in FAMILIES.items() if not case.vision]
LIMITS = {
    "pq": PQAttention.dense_limit(),
    "pq_kept": PQAttention(granularity="token", num_keys=64, logit_clamp=1e4, codebook_init="normal"),
    "flood": FloodFillAttention.dense_limit(),
    "tokens": TokenSelection.dense_limit(),
}
TOKENS = 24


def converted(case: Family, config: MethodConfig) -> Any:
    model = case.model()
    sparsify(model, config, calibration=[case.batch(2, 40)])
    return model


def padded(case: Family, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """(arguments of the model, its attention mask): rows of several lengths, one of them empty."""
    mask = torch.ones(4, TOKENS, dtype=torch.int64)
    mask[1, :9], mask[2, : TOKENS - 3], mask[3] = 0, 0, 0
    if kind == "right":
        mask = mask.flip(1)
    elif kind == "inside":
        mask[0, 5:9], mask[3, :4], mask[3, 10:13], mask[3, 15:] = 0, 1, 1, 1
    ids = case.batch(4, TOKENS)["input_ids"] * mask
    given = {"input_ids": ids, "attention_mask": mask}
    if case.causal and case.name != "opt":
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return given, mask


def check_all_rows(family: str, config: MethodConfig, kind: str, read_alone: bool = False) -> None:
    """read_alone: of logits, those of padding at the end of a row, which nothing reads, may differ."""
    case = FAMILIES[family]
    plain, model = case.model(), converted(case, config)
    given, mask = padded(case, kind)
    read = mask.flip(1).cumsum(1).flip(1) > 0 if case.causal and read_alone else slice(None)
    torch.testing.assert_close(model(**given).logits[read], plain(**given).logits[read], rtol=1e-4, atol=1e-4)
    labels = given["input_ids"].masked_fill(mask == 0, -100) if case.causal else torch.tensor([0, 1, 0, 1])
    losses = [m.train()(**given, labels=labels).loss for m in (model, plain)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    gradients = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["left", "right", "inside"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt", "bert", "distilbert"])
@pytest.mark.parametrize("limit", ["pq", "tokens"])
def test_the_dense_limit_is_the_plain_model_on_every_row_padding_included(limit: str, family: str, kind: str) -> None:
    check_all_rows(family, LIMITS[limit], kind)


@pytest.mark.parametrize("kind", ["left", "right", "inside"])
@pytest.mark.parametrize("family", ["llama", "mistral", "bert"])
def test_flood_fill_at_its_dense_limit_is_the_plain_model(family: str, kind: str) -> None:
    check_all_rows(family, LIMITS["flood"], kind)


@pytest.mark.parametrize("kind", ["left", "right", "inside"])
@pytest.mark.parametrize("family", ["llama", "mistral", "bert"])
def test_a_sparse_attention_that_keeps_every_key_is_the_plain_model_where_anything_is_read(
    family: str, kind: str
) -> None:
    check_all_rows(family, LIMITS["pq_kept"], kind, read_alone=True)


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


METHODS = {
    "pq": PQAttention.example(),
    "pq_token": PQAttention(granularity="token", num_keys=12, local_tokens=2, codebook_init="normal"),
    "flood": FloodFillAttention(block_tokens=8, filter_edge=3, keep_ratio=0.6, variant="top_q", max_dense_steps=0),
    "flood_limit": FloodFillAttention.dense_limit(),
    "tokens": TokenSelection(),
}


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("method", list(METHODS))
def test_packed_rows_beside_a_mask_are_separated_whatever_the_neighbours(method: str, family: str) -> None:
    case = FAMILIES[family]
    model = case.model()
    sparsify(model, METHODS[method], calibration=[case.batch(2, 100)])
    ids = case.batch(1, 60)["input_ids"]
    positions = torch.cat([torch.arange(25), torch.arange(35)])[None]

    def logits(rows: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        with torch.no_grad():
            return model(input_ids=rows, attention_mask=mask, position_ids=positions, use_cache=False).logits

    ones = torch.ones_like(ids)
    second = logits(ids[:, 25:], None, torch.arange(35)[None])[0]
    first = logits(ids[:, :25], None, torch.arange(25)[None])[0]
    padding = torch.zeros(1, 7, dtype=torch.int64)
    left = torch.cat([padding, ids], 1)
    left_mask, left_positions = torch.cat([padding, ones], 1), torch.cat([padding + 1, positions], 1)
    right = torch.cat([ids, padding], 1)
    right_mask, right_positions = torch.cat([ones, padding], 1), torch.cat([positions, padding + 1], 1)
    both = (torch.cat(pair) for pair in ((left, right), (left_mask, right_mask), (left_positions, right_positions)))
    from_left, from_right = logits(*both)
    for found in (logits(ids, ones, positions)[0], from_left[7:], from_right[:60]):
        assert far(found[25:], second) < 1e-4
        assert far(found[:25], first) < 1e-4


@pytest.mark.parametrize("offset", [0, 5])
def test_positions_that_do_not_restart_are_one_sequence(offset: int) -> None:
    case = FAMILIES["llama"]
    plain, model = case.model(), converted(case, LIMITS["pq"])
    given, _ = padded(case, "left")
    given["position_ids"] = torch.arange(TOKENS)[None] + offset
    torch.testing.assert_close(model(**given).logits, plain(**given).logits, rtol=1e-4, atol=1e-4)


def test_routed_rows_do_not_depend_on_a_padded_neighbour() -> None:
    case = FAMILIES["llama"]
    model = converted(case, RoutedFFN.example())
    ids = case.batch(2, 30)["input_ids"]
    mask, positions = torch.ones_like(ids), torch.cat([torch.arange(12), torch.arange(18)]).expand(2, -1)
    mask[1, 20:] = 0
    with torch.no_grad():
        both = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        alone = model(input_ids=ids[:1], attention_mask=mask[:1], position_ids=positions[:1], use_cache=False).logits
    assert far(both[:1], alone) < 1e-4


def test_a_short_sequence_runs_dense_beside_a_long_one() -> None:
    case = FAMILIES["llama"]
    for granularity in ("block", "token"):
        config = PQAttention(
            granularity=granularity, num_keys=8, block_q=4, block_k=4, local_tokens=2, dense_below=32,
            codebook_init="normal",
        )  # fmt: skip
        plain, model = case.model(), converted(case, config)
        ids, mask = case.batch(2, 60)["input_ids"], torch.ones(2, 60, dtype=torch.int64)
        mask[1, 20:] = 0
        with torch.no_grad():
            found, expected = (m(input_ids=ids, attention_mask=mask).logits for m in (model, plain))
        assert far(found[1, :20], expected[1, :20]) < 1e-4
        assert far(found[0], expected[0]) > 1e-2


@pytest.mark.parametrize("family", TEXT)
def test_attention_maps_are_refused_by_name(family: str) -> None:
    case = FAMILIES[family]
    model = converted(case, LIMITS["pq"])
    with pytest.raises(ValueError, match="output_attentions=True"):
        model(**case.batch(1, 6), output_attentions=True)
    assert model(**case.batch(1, 6), output_hidden_states=True).hidden_states
