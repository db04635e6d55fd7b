"""sparsify and PEFT in both orders: the same training step, and a saved adapter that loads to the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import sparsetrain
from sparsetrain import FloodFillAttention, PQAttention, RoutedFFN, SemiStructured, TokenSelection
from sparsetrain.hf.model.io import load, save
from tests.families import FAMILIES

METHODS = [
    PQAttention.example(),
    RoutedFFN(num_blocks=4, num_active=2, partition="clustered"),
    TokenSelection(keep_ratio=0.4),
    FloodFillAttention.example(),
    SemiStructured(decay=0.0),
]


def step(family: str, config: Any, sparsify_first: bool) -> tuple[Any, sparsetrain.Handle, Tensor, dict[str, Tensor]]:
    """The model, its handle, and loss and gradients of a training step with a LoRA that acts."""
    case = FAMILIES[family]
    model: Any = case.model()
    calibration = [case.batch(4, 60, seed=5)]
    if sparsify_first:
        handle = sparsetrain.sparsify(model, config, calibration=calibration)
    lora = LoraConfig(
        r=2, target_modules="all-linear", modules_to_save=handle.modules_to_save if sparsify_first else None
    )
    peft = get_peft_model(model, lora)
    if not sparsify_first:
        handle = sparsetrain.sparsify(peft, config, calibration=calibration)
    peft.train()
    handle.step(0, 100)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            # B of an FFN stays zero: its units lie in another order when it was made before the conversion
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2
            parameter.data = drawn if "lora_A" in name or "att" in name else torch.zeros_like(parameter)
    batch = case.batch(2, 60)
    loss = peft(**batch, labels=batch["input_ids"] if case.causal else torch.tensor([0, 1])).loss
    loss.backward()
    found = {name.replace(".modules_to_save.default", ""): p.grad for name, p in peft.named_parameters()}
    return peft, handle, loss.detach(), {name: grad for name, grad in found.items() if grad is not None}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.method)
def test_both_orders_train_alike_and_load_again(family: str, config: Any, tmp_path: Path) -> None:
    first, second = step(family, config, True), step(family, config, False)
    torch.testing.assert_close(second[2], first[2], rtol=0, atol=1e-6)
    assert first[3].keys() == second[3].keys() and first[3]
    for name, grad in first[3].items():
        torch.testing.assert_close(second[3][name], grad, rtol=1e-4, atol=1e-6, msg=name)
    assert first[1].state().keys() == second[1].state().keys()

    FAMILIES[family].model().save_pretrained(tmp_path / "base")
    peft, handle = second[:2]
    handle.settle()
    batch = FAMILIES[family].batch(2, 60)
    expected = peft.eval()(**batch).logits
    save(peft, handle, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    loaded = load(tmp_path / "adapter")
    assert loaded.handle is not None
    loaded.handle.settle()
    torch.testing.assert_close(loaded.model(**batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_targets_are_named_as_in_the_library_s_model_also_inside_peft() -> None:
    case = FAMILIES["llama"]
    config = RoutedFFN(num_blocks=4, num_active=2, targets=("model.layers.1.mlp",))
    peft = get_peft_model(case.model(), LoraConfig(r=2, target_modules="all-linear"))
    handle = sparsetrain.sparsify(peft, config, calibration=[case.batch(4)])
    assert [edit.site for edit in handle.plan.edits] == ["model.layers.1.mlp"]


def test_a_state_of_another_recipe_is_refused_and_nothing_is_changed() -> None:
    case = FAMILIES["llama"]
    handle = sparsetrain.sparsify(case.model(), PQAttention.example(), calibration=[case.batch(4)])
    model = case.model()
    with pytest.raises(ValueError, match=r"holds model\.layers\.0\.self_attn:pq_attention"):
        sparsetrain.sparsify(model, RoutedFFN.example(), state=handle.state())
    expected = case.model()(**case.batch()).logits
    assert torch.equal(model(**case.batch()).logits, expected)


@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.method)
def test_a_copy_of_a_converted_module_is_refused(config: Any) -> None:
    case = FAMILIES["llama"]
    model = case.model()
    handle = sparsetrain.sparsify(model, config, calibration=[case.batch(4, 60)])
    handle.step(0, 10)
    copied = handle.plan.edits[0].site.rpartition(".")[2]
    if copied == "0":
        copied = "layers.0"
    get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], modules_to_save=[copied]))
    with pytest.raises(ValueError, match=rf"PEFT trains a copy of .*{copied} \(modules_to_save\).*{config.method}"):
        handle.step(0, 10)
