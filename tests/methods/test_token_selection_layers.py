"""Which layers the two passes note, and that no mode looks into a block that has no need of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.overrides import _get_current_function_mode

import sparsetrain
from sparsetrain import TokenSelection
from sparsetrain.methods.token_selection.layers import layers_of
from sparsetrain.ops.selected_rows import Rows
from sparsetrain.surgery.lora import linear_parts, plain_lora
from tests.families import FAMILIES


def converted(family: str, **lora: Any) -> tuple[Any, Any, dict[str, Any]]:
    """(the converted model, what is called, a batch)."""
    case = FAMILIES[family]
    model = case.model().train()
    sparsetrain.sparsify(model, TokenSelection())
    called = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **lora)).train() if lora else model
    return model, called, case.batch()


def selector_of(model: Any) -> Any:
    return next(m.selected.selector for m in model.modules() if "selected" in getattr(m, "_modules", {}))


def is_watched(model: Any, called: Any, batch: dict[str, Any]) -> list[bool]:
    """Of every norm that is called in a training step: does a TorchFunctionMode look on?"""
    found: list[bool] = []
    hooks = [
        module.register_forward_hook(lambda *_: found.append(_get_current_function_mode() is not None))
        for block in model.modules()
        if "selected" in getattr(block, "_modules", {})
        for module in block.modules()
        if "norm" in type(module).__name__.lower()
    ]
    called(**batch)
    for hook in hooks:
        hook.remove()
    assert found
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_block_is_watched_once(family: str) -> None:
    given = converted(family)
    assert all(is_watched(*given))
    assert not any(is_watched(*given))


def test_functional_dropout_goes_on_being_watched() -> None:
    given = converted("opt")
    assert all(is_watched(*given)) and all(is_watched(*given))


def test_a_block_is_watched_again_when_its_layers_are_others() -> None:
    model, called, batch = converted("llama", lora_alpha=8)
    is_watched(model, called, batch)
    assert not any(is_watched(model, called, batch))
    with called.disable_adapter():
        assert all(is_watched(model, called, batch))


def test_dropout_that_nobody_watches_is_the_one_that_was_drawn() -> None:
    model, _, batch = converted("gpt2")
    rows, grads = Rows.of([[0, 9, 40], [3, 50, 99]], 100), []
    for _ in range(3):
        model.zero_grad()
        torch.manual_seed(5)
        for block in model.transformer.h:
            block.mlp.dropout.p = block.attn.resid_dropout.p = 0.3
        with selector_of(model).using(rows):
            model(**batch).logits.square().mean().backward()
        grads.append(model.transformer.h[0].mlp.c_fc.weight.grad.clone())
    assert grads[0].any() and torch.equal(grads[0], grads[1]) and torch.equal(grads[1], grads[2])


def test_layers_are_found_once_each() -> None:
    model, called, _ = converted("gpt2", lora_alpha=8, lora_dropout=0.1)
    layers = layers_of(model.transformer.h[0])
    assert not layers.adapters and len(layers.linears) == 3 * 4 and len(layers.dropouts) == 3 + 4
    called.eval()
    layers = layers_of(model.transformer.h[0])  # dropout is off
    assert len(layers.adapters) == 4 and not layers.linears and len(layers.dropouts) == 3


@pytest.mark.parametrize("names", [["default"], ["default", "second"]])
def test_plain_lora_reads_what_linear_parts_reads(names: list[str]) -> None:
    model, called, _ = converted("gpt2", lora_alpha=12)
    called.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    called.base_model.set_adapter(names)
    found = plain_lora(model.transformer.h[0])
    assert len(found) == 4
    for module, parts in found.items():
        expected = linear_parts(module, transposed=True)
        assert parts.lora is not None and expected.lora is not None
        assert (parts.lora_scale is None) == (len(names) > 1)
        scale = 1 if parts.lora_scale is None else parts.lora_scale
        torch.testing.assert_close(parts.lora[1] * scale @ parts.lora[0], expected.lora[1] @ expected.lora[0])
        assert torch.equal(parts.weight, expected.weight) and parts.bias is expected.bias


def test_a_lora_is_added_as_peft_adds_it_to_the_last_bit() -> None:
    _, called, batch = converted("llama", lora_alpha=7)
    for name, parameter in called.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    found = called(**batch).logits.detach()
    with torch.no_grad():
        assert torch.equal(found, called(**batch).logits)
