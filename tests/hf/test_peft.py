"""LoRA through PEFT on top of both methods, in the order load → sparsify → PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import sparsetrain
from sparsetrain import PQAttention, RoutedFFN
from tests.families import FAMILIES

TEXT = [name for name, family in FAMILIES.items() if not family.vision]


def convert(family: str, gate: str = "output") -> tuple[Any, sparsetrain.Handle, Any]:
    case = FAMILIES[family]
    model = case.model()
    routed = RoutedFFN.from_dict({**RoutedFFN.example().to_dict(), "gate": gate})
    handle = sparsetrain.sparsify(model, routed, PQAttention.example(), calibration=[case.batch(4, seed=5)])
    return model, handle, case


def lora(handle: sparsetrain.Handle | None = None, **options: Any) -> LoraConfig:
    return LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules="all-linear",
        modules_to_save=handle.modules_to_save if handle else None,
        **options,
    )


def shake(model: Any, seed: int = 2) -> None:
    """Give LoRA's B, which starts at zero, something to do."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_all_linear_wraps_the_same_modules_as_on_the_dense_model(family: str) -> None:
    dense = get_peft_model(FAMILIES[family].model(), lora())
    model, handle, _ = convert(family)
    sparse = get_peft_model(model, lora(handle))
    wrapped = [{n for n, m in x.named_modules() if hasattr(m, "lora_A")} for x in (dense, sparse)]
    assert wrapped[0] == wrapped[1]
    ours = [n for n, p in sparse.named_parameters() if ("router" in n or "codebook" in n) and "original" not in n]
    assert ours and all(sparse.get_parameter(n).requires_grad for n in ours)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_zero_lora_changes_nothing_and_gradients_flow(family: str) -> None:
    model, handle, case = convert(family)
    batch = case.batch()
    expected = model(**batch).logits.detach()
    peft = get_peft_model(model, lora(handle))
    torch.testing.assert_close(peft(**batch).logits, expected, rtol=1e-5, atol=1e-5)
    shake(peft)
    peft.train()
    handle.step(0, 100)
    peft(**batch).logits.square().mean().backward()
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("family", TEXT)
def test_lora_in_a_routed_ffn_equals_its_merged_weights(family: str) -> None:
    model, handle, case = convert(family)
    batch = case.batch()
    peft = get_peft_model(model, lora(handle)).eval()
    shake(peft)
    expected = peft(**batch).logits.detach()
    merged = peft.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert"])
def test_adapter_files_hold_the_dense_order_and_reload(family: str, tmp_path: Any) -> None:
    model, handle, case = convert(family)
    batch = case.batch()
    peft = get_peft_model(model, lora(handle)).eval()
    shake(peft)
    expected = peft(**batch).logits.detach()
    peft.save_pretrained(tmp_path)

    again = case.model()
    sparsetrain.sparsify(again, *handle.configs, state=handle.state())
    again = PeftModel.from_pretrained(again, str(tmp_path)).eval()
    torch.testing.assert_close(again(**batch).logits, expected, rtol=1e-5, atol=1e-5)

    # the routers dropped, the LoRA factors on the plain dense model: same as the converted one made dense again
    handle.restore()
    plain = get_peft_model(case.model(), lora()).eval()
    state = {k.replace("weight", "default.weight") if "lora_" in k else k: v for k, v in _adapter(tmp_path).items()}
    plain.load_state_dict({k: v for k, v in state.items() if "lora_" in k}, strict=False)
    dense_again = {n: p for n, p in peft.named_parameters() if "lora_" in n}
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            assert parameter.abs().sum() > 0
            torch.testing.assert_close(parameter.sum(), dense_again[name].sum(), rtol=1e-4, atol=1e-4)


def _adapter(folder: Any) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_dora_is_refused_with_the_reason() -> None:
    model, handle, case = convert("llama")
    peft = get_peft_model(model, lora(handle, use_dora=True))
    with pytest.raises(ValueError, match="DoRA"):
        peft(**case.batch())


def test_disabled_adapters_give_the_converted_model() -> None:
    model, handle, case = convert("llama")
    batch = case.batch()
    expected = model(**batch).logits.detach()
    peft = get_peft_model(model, lora(handle)).eval()
    shake(peft)
    with peft.disable_adapter():
        torch.testing.assert_close(peft(**batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_peft_model_can_be_converted_afterwards() -> None:
    case = FAMILIES["llama"]
    batch = case.batch()
    peft = get_peft_model(case.model(), lora()).eval()
    shake(peft)
    expected = peft(**batch).logits.detach()
    handle = sparsetrain.sparsify(peft, RoutedFFN.example(), calibration=[case.batch(4, seed=5)])
    assert len(handle.plan.edits) == 3
    assert not torch.allclose(peft(**batch).logits, expected)
    handle.restore()
    assert torch.equal(peft(**batch).logits, expected)
