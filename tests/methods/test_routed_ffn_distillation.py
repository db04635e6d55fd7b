"""Layer-wise distillation: every routed FFN comes closer to its dense FFN, and nothing else moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from sparsetrain import RoutedFFN, sparsify
from sparsetrain.core.anatomy import describe, submodule
from sparsetrain.methods.routed_ffn.calibrate import read_inputs
from sparsetrain.methods.routed_ffn.distillation import Student, distill, teaching
from sparsetrain.methods.routed_ffn.module import Routed
from tests.families import FAMILIES, Family

CONFIG = RoutedFFN(num_blocks=4, num_active=1, shared_ratio=0.25, partition="clustered", compensation="mean")
LLAMA = FAMILIES["llama"]
ANY = pytest.mark.parametrize("family", list(FAMILIES.values()), ids=list(FAMILIES))


def with_lora(family: Family) -> tuple[Any, dict[str, Tensor]]:
    """A converted model in LoRA, and the batch that it was converted on."""
    model, batch = family.model(), family.batch()
    handle = sparsify(model, CONFIG, calibration=[batch], seed=0)
    handle.settle()
    linears = [
        f"{site.name}.{name}" for site in describe(model).ffns for name in (site.up, site.gate, site.down) if name
    ]
    lora = LoraConfig(
        r=4,
        target_modules=linears,
        modules_to_save=handle.modules_to_save,
        fan_in_fan_out=describe(model).family == "gpt2",
    )
    return get_peft_model(model, lora), batch


@ANY
def test_the_error_falls_and_the_base_stays(family: Family) -> None:
    model, batch = with_lora(family)
    model.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    errors = distill(model, [batch] * 30, steps=30, lr=2e-3)
    assert len(errors) == 30
    assert errors[-1] < 0.98 * errors[0], errors
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(".router." in name or "lora_" in name for name in moved)
    assert model.training and all("forward" not in vars(m.routed) for m in model.modules() if isinstance(m, Routed))


def test_while_it_learns_the_model_is_dense() -> None:
    family = LLAMA
    dense, batch = family.model(), family.batch()
    model, _ = with_lora(family)
    students = [Student(owner) for owner in model.modules() if isinstance(owner, Routed)]
    with torch.no_grad():
        expected = dense(**batch).logits
        assert not torch.allclose(model(**batch).logits, expected, atol=1e-3)
        with teaching(students):
            torch.testing.assert_close(model(**batch).logits, expected, atol=1e-4, rtol=1e-4)


def test_each_student_has_the_gradient_of_its_own_error() -> None:
    model, batch = with_lora(LLAMA)
    owners = [owner for owner in model.modules() if isinstance(owner, Routed)]
    students = [Student(owner) for owner in owners]
    alone = [Student(owners[1])]
    with torch.no_grad(), teaching(students):
        model(**batch)
    found = [p.grad.clone() for p in students[1].trained if p.grad is not None]
    # the layer before stays dense, so the second sees the same inputs
    with torch.no_grad(), teaching(students[:1]), teaching(alone):
        model(**batch)
    expected = [p.grad for p in alone[0].trained if p.grad is not None]
    assert found and len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_padding_teaches_nothing() -> None:
    family = LLAMA
    model, batch = with_lora(family)
    longer = {name: torch.nn.functional.pad(value, (0, 20)) for name, value in batch.items()}
    noisy = longer | {"input_ids": longer["input_ids"].clone()}
    noisy["input_ids"][:, -20:] = 7
    students = [Student(owner) for owner in model.modules() if isinstance(owner, Routed)]
    grads = []
    with torch.no_grad(), teaching(students):
        for one in (longer, noisy):
            model(**one)
            grads.append([p.grad.clone() for p in students[0].trained if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_model_without_dropped_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="no routed FFN"):
        distill(LLAMA.model(), [], steps=1)


@ANY
def test_inputs_are_read_without_the_head(family: Family) -> None:
    model, batch = family.model(), family.batch()
    anatomy = describe(model)
    sites = [block.ffn for block in anatomy.blocks[:2] if block.ffn is not None]
    later: list[int] = []
    model.get_submodule(anatomy.blocks[2].name).register_forward_hook(lambda *_: later.append(1))
    seen: list[Tensor] = []
    linear = submodule(model, f"{sites[1].name}.{sites[1].up}")
    hook = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    later.clear()
    found = read_inputs(model, sites, [batch])
    torch.testing.assert_close(found[sites[1].name][0], seen[0])
    assert not later


def test_inputs_beyond_the_limit_are_evenly_spaced_real_tokens() -> None:
    model, batch = LLAMA.model(), LLAMA.batch(rows=2, tokens=90)
    batch["attention_mask"][1, 60:] = 0
    site = describe(model).ffns[0]
    every, _ = read_inputs(model, [site], [batch])[site.name]
    spread, _ = read_inputs(model, [site], [batch], max_tokens=60)[site.name]
    assert len(every) == 150
    assert torch.equal(spread, every[::3])
