from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers.pytorch_utils import Conv1D

import sparsetrain
from sparsetrain.surgery.chunked_loss import use_chunked_loss
from tests.families import FAMILIES

CAUSAL = [name for name, case in FAMILIES.items() if case.causal and not case.vision]


def made(family: str, lora: bool) -> Any:
    model = FAMILIES[family].model()
    if lora:
        transposed = any(isinstance(module, Conv1D) for module in model.modules())
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=transposed))
    return model.train()


def step(model: Any, **given: Any) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", CAUSAL)
def test_loss_and_gradients_are_the_model_s_own(family: str, lora: bool) -> None:
    batch = FAMILIES[family].batch()
    labels = batch["input_ids"].clone()
    labels[0, :40] = -100
    model, other = made(family, lora), made(family, lora)
    assert use_chunked_loss(other) and not use_chunked_loss(other)
    for given in ({}, {"num_items_in_batch": torch.tensor(777)}):
        loss, gradients = step(model, **batch, labels=labels, **given)
        found, others = step(other, **batch, labels=labels, **given)
        assert found == pytest.approx(loss, rel=1e-5)
        assert gradients.keys() == others.keys()
        largest = max(float(g.abs().max()) for g in gradients.values())
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=2e-5 * largest, msg=name)
    with torch.no_grad():
        assert torch.equal(other.eval()(**batch, labels=labels).logits, model.eval()(**batch, labels=labels).logits)


def test_no_step_holds_all_logits() -> None:
    model, batch = made("llama", True), FAMILIES["llama"].batch(2, 200)
    use_chunked_loss(model)
    shapes: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(**batch, labels=batch["input_ids"])
    assert out.logits is None
    vocabulary = model.get_base_model().config.vocab_size
    assert shapes and not any(vocabulary in shape and len(shape) > 2 for shape in shapes)


def test_where_it_cannot() -> None:
    from sparsetrain import TokenSelection

    assert not use_chunked_loss(FAMILIES["bert"].model())
    selecting = FAMILIES["llama"].model()
    sparsetrain.sparsify(selecting, TokenSelection())  # has both already
    assert not use_chunked_loss(selecting)
    capped = FAMILIES["gemma3"].model()
    capped.config.final_logit_softcapping = 30.0
    assert not use_chunked_loss(capped)
