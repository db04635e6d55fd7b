"""Adapters on 2:4 linears: what is merged into them or computes past them is refused, what adds to them is exact."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model

import sparsetrain
from sparsetrain import SemiStructured
from tests.families import FAMILIES

TARGETS = ["gate_proj", "up_proj", "down_proj"]


def adapted(config: Any = None, first: bool = True, **options: Any) -> tuple[Any, sparsetrain.Handle, dict[str, Any]]:
    case = FAMILIES["llama"]
    model = case.model()
    config = config or LoraConfig(r=3, target_modules="all-linear", **options)
    if first:
        handle = sparsetrain.sparsify(model, SemiStructured(decay=0.0))
        made = get_peft_model(model, config)
    else:
        made = get_peft_model(model, config)
        handle = sparsetrain.sparsify(made, SemiStructured(decay=0.0))
    for name, parameter in made.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    return made.eval(), handle, case.batch()


@pytest.mark.parametrize("first", [True, False], ids=["sparsify first", "peft first"])
@pytest.mark.parametrize("seen", [True, False], ids=["run before", "never run"])
def test_a_merged_adapter_is_refused_at_the_next_forward(first: bool, seen: bool) -> None:
    model, _, batch = adapted(first=first)
    if seen:
        model(**batch)
    plain = copy.deepcopy(model).merge_and_unload()
    with pytest.raises(ValueError, match="was changed after it was packed"):
        plain(**batch)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"lora\.Linear on gate_proj changes a weight that runs 2:4"):
        model(**batch)


@pytest.mark.parametrize("move", [lambda model: model.double(), lambda model: model.train().eval()])
def test_moving_a_merged_model_does_not_hide_it(move: Any) -> None:
    model, _, _ = adapted()
    plain = model.merge_and_unload()
    with pytest.raises(ValueError, match="was changed after it was packed"):
        move(plain)


def test_merging_while_it_runs_dense_is_refused_when_it_runs_sparse_again() -> None:
    model, handle, batch = adapted()
    with pytest.raises(ValueError, match="was changed after it was packed"), handle.dense():
        outputs = model(**batch).logits.detach()
        model.merge_adapter()
        torch.testing.assert_close(model(**batch).logits, outputs, rtol=1e-4, atol=1e-4)


def test_unmerged_again_it_runs_and_in_the_dense_tail_a_merge_is_exact() -> None:
    model, handle, batch = adapted()
    outputs = model(**batch).logits.detach()
    model.merge_adapter()
    model.unmerge_adapter()
    handle.settle()  # rounding of the merge stays in the weights
    torch.testing.assert_close(model(**batch).logits, outputs, rtol=1e-4, atol=1e-4)
    handle.step(99, 100)
    dense = model(**batch).logits.detach()
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain.double().eval()(**batch).logits.float(), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", [True, False], ids=["sparsify first", "peft first"])
def test_weights_that_an_initialisation_moves_are_packed_anew(first: bool) -> None:
    model, handle, batch = adapted(first=first, init_lora_weights="pissa")
    handle.step(0, 100)
    outputs = model(**batch).logits.detach()
    handle.settle()
    torch.testing.assert_close(model(**batch).logits, outputs)


@pytest.mark.parametrize(
    "config",
    [
        peft.HRAConfig(r=2, target_modules=TARGETS),
        LoraConfig(r=2, target_modules=[], target_parameters=[f"{name}.weight" for name in TARGETS]),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["up_proj"]),
    ],
    ids=["hra", "target_parameters", "modules_to_save"],
)
def test_what_computes_past_the_linear_is_refused(config: Any) -> None:
    with pytest.raises(ValueError, match=r"semi_structured: .*(up_proj|gate_proj)"):
        model, _, batch = adapted(config)
        model(**batch)


@pytest.mark.parametrize("kind", ["IA3Config", "LoHaConfig", "LoKrConfig", "OFTConfig"])
def test_what_adds_to_the_linear_s_output_is_welcome(kind: str) -> None:
    options: dict[str, Any] = {"OFTConfig": {"oft_block_size": 4}, "IA3Config": {"feedforward_modules": ["down_proj"]}}
    config = getattr(peft, kind)(target_modules=TARGETS, **options.get(kind, {}))
    model, handle, batch = adapted(config)
    outputs = model(**batch).logits.detach()
    with handle.dense():
        assert (model(**batch).logits - outputs).abs().max() > 1e-3


@pytest.mark.parametrize("mask_mode", ["transposable", "row", "soft"])
@pytest.mark.parametrize("assign", [True, False], ids=["assigned", "to_empty"])
def test_a_model_on_the_meta_device_gets_its_masks_with_its_weights(mask_mode: str, assign: bool) -> None:
    case = FAMILIES["gpt2"]
    config = SemiStructured(mask_mode=mask_mode)
    real = case.model()
    with torch.device("meta"):
        model: Any = case.build()
    handle = sparsetrain.sparsify(model, config)
    if not assign:
        model.to_empty(device="cpu")
        with pytest.raises(ValueError, match="left the meta device"):
            model(**case.batch())
    model.load_state_dict(real.state_dict(), assign=assign)
    expected = sparsetrain.sparsify(real, config)
    torch.testing.assert_close(model.eval()(**case.batch()).logits, real(**case.batch()).logits, rtol=0, atol=0)
    for key, tensors in expected.state().items():
        assert all(torch.equal(tensor, handle.state()[key][name]) for name, tensor in tensors.items()), key
    handle.restore()
    assert {name for name, _ in model.named_buffers()} == {name for name, _ in case.model().named_buffers()}


def test_a_state_given_on_the_meta_device_is_kept_for_the_weights() -> None:
    case = FAMILIES["gpt2"]
    real = case.model()
    handle = sparsetrain.sparsify(real, SemiStructured(mask_mode="row"))
    for _, site in handle.installed:
        installed: Any = site
        for linear in installed.linears.values():  # other masks than the weights would give
            linear.mask.copy_(linear.mask.roll(1, dims=linear.groups_dim))
            linear.repack()
    with torch.device("meta"):
        model: Any = case.build()
    again = sparsetrain.sparsify(model, SemiStructured(mask_mode="row"), state=handle.state())
    model.load_state_dict(real.state_dict(), assign=True)
    for key, tensors in handle.state().items():
        assert all(torch.equal(tensor, again.state()[key][name]) for name, tensor in tensors.items()), key
    torch.testing.assert_close(model.eval()(**case.batch()).logits, real(**case.batch()).logits, rtol=0, atol=0)
