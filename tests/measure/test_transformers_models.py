"""Saved bytes on transformers models: dense, converted, and inside PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import sparsetrain
from sparsetrain import RoutedFFN
from sparsetrain.measure import saved_activations
from tests.families import FAMILIES, FFN, HIDDEN, LAYERS, VOCAB

ROWS, TOKENS, FLOAT = 2, 24, 4


def _measure(model: Any, family: Any) -> Any:
    batch = family.batch(rows=ROWS, tokens=TOKENS)
    model.train()
    if family.causal:
        return saved_activations(model, lambda: model(**batch, labels=batch["input_ids"]).loss)
    return saved_activations(model, lambda: model(**batch, labels=torch.zeros(ROWS, dtype=torch.long)).loss)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_keeps_its_activations_where_they_belong(name: str) -> None:
    family = FAMILIES[name]
    found = _measure(family.model(), family)
    assert found.total == sum(found.by_component.values()) > 0
    assert sorted(found.by_layer) == list(range(LAYERS))
    # nearly everything has a name; masks, positions and gathers of the model's own forward are the rest
    assert found.by_component["other"] < 0.15 * found.total
    first, second = found.by_layer[1], found.by_layer[2]
    assert {"attention", "ffn", "norms"} <= set(first) == set(second)
    tokens = ROWS * TOKENS if not family.vision else ROWS * 101
    # the FFN keeps at least one hidden storage, the attention q, k, v and its result (2 of 4 heads are k's and v's)
    assert first["ffn"] >= tokens * FFN * FLOAT
    assert first["attention"] >= tokens * 2 * HIDDEN * FLOAT
    assert found.by_component["head_and_loss"] > 0
    if family.causal:
        assert found.by_component["head_and_loss"] >= tokens * VOCAB * FLOAT


def test_routing_saves_in_the_ffn_and_nowhere_else() -> None:
    family = FAMILIES["llama"]
    model = family.model()
    dense = _measure(model, family)
    handle = sparsetrain.sparsify(model, RoutedFFN(num_blocks=8, num_active=2, partition="contiguous"))
    sparse = _measure(model, family)
    assert sparse.by_component["ffn"] < 0.7 * dense.by_component["ffn"]
    for component in ("attention", "head_and_loss", "embedding"):
        assert sparse.by_component[component] == dense.by_component[component]
    handle.restore()
    assert _measure(model, family) == dense


@pytest.mark.parametrize("name", ["opt", "bert"])
def test_a_routed_ffn_inside_its_block_is_still_the_ffn(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    dense = _measure(model, family)
    sparsetrain.sparsify(model, RoutedFFN(num_blocks=8, num_active=2, partition="contiguous"))
    sparse = _measure(model, family)
    # at this width the routing's own logits and indices outweigh what it saves; what counts is where they are booked
    assert sparse.by_component["ffn"] != dense.by_component["ffn"]
    assert sparse.by_component | {"ffn": 0} == dense.by_component | {"ffn": 0}


def test_peft_adapters_are_a_component_with_layers() -> None:
    family = FAMILIES["llama"]
    model = get_peft_model(
        family.model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    found = _measure(model, family)
    tokens = ROWS * TOKENS
    # A keeps its input (q and v share the norm's output; down has its own), B keeps A's result
    expected = tokens * (HIDDEN + FFN + 3 * 4) * FLOAT
    assert [found.by_layer[layer]["adapters"] for layer in range(LAYERS)] == [expected] * LAYERS
    assert found.by_component["adapters"] == LAYERS * expected
    assert found.by_component["attention"] > 0 and found.by_component["ffn"] > 0


def test_checkpointing_of_transformers_is_seen() -> None:
    family = FAMILIES["llama"]
    model = family.model()
    plain = _measure(model, family)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = _measure(model, family)
    in_blocks = sum(sum(layer.values()) for layer in found.by_layer.values())
    assert found.total < 0.5 * plain.total
    assert in_blocks <= LAYERS * ROWS * TOKENS * HIDDEN * FLOAT
