"""A converted model whose attention implementation is set to another: refused at once, undone by restore."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import sparsetrain
from sparsetrain import FloodFillAttention, PQAttention, TokenSelection
from tests.families import FAMILIES

METHODS = [PQAttention.example(), TokenSelection(keep_ratio=0.4), FloodFillAttention.example()]


def converted(config: Any, family: str = "llama", peft: bool = False) -> tuple[Any, sparsetrain.Handle, dict[str, Any]]:
    case = FAMILIES[family]
    model = case.model()
    handle = sparsetrain.sparsify(model, config, calibration=[case.batch(4, seed=5)])
    if peft:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    return model.train(), handle, case.batch(2, 60)


@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.method)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("peft", [False, True], ids=["bare", "peft"])
def test_another_implementation_is_refused_at_the_next_forward(config: Any, implementation: str, peft: bool) -> None:
    model, _, batch = converted(config, peft=peft)
    before = model.config._attn_implementation
    model(**batch)
    model.set_attn_implementation(implementation)
    with pytest.raises(ValueError, match=f"set to {implementation!r} after sparsify"):
        model(**batch)
    model.set_attn_implementation(before)
    model(**batch)


@pytest.mark.parametrize("family", ["gpt2", "bert", "opt", "qwen3", "vit"])
def test_set_by_hand_in_the_config_is_refused_too(family: str) -> None:
    model, _, _ = converted(PQAttention.example(), family)
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="after sparsify"):
        model(**FAMILIES[family].batch(2, 60))


def test_a_copy_refuses_as_well_and_restore_brings_the_first_implementation_back() -> None:
    model, handle, batch = converted(TokenSelection(keep_ratio=0.4))
    again = copy.deepcopy(model)
    again.set_attn_implementation("eager")
    model.set_attn_implementation("eager")
    for one in (model, again):
        with pytest.raises(ValueError, match="after sparsify"):
            one(**batch)
    handle.restore()
    assert model.config._attn_implementation == "sdpa"
    expected = FAMILIES["llama"].model()(**batch).logits
    torch.testing.assert_close(model.eval()(**batch).logits, expected, rtol=0, atol=0)
