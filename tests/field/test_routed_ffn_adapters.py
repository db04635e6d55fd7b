"""Every kind of adapter that PEFT has, on the linears of a routed FFN: it counts exactly, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

import sparsetrain
from sparsetrain import PQAttention, RoutedFFN
from sparsetrain.hf.model.models import add_lora
from sparsetrain.recipes.finetune import Recipe
from tests.families import FAMILIES, Family, llama_config

CASES = {
    "llama": (
        Family("llama", lambda: LlamaForCausalLM(llama_config(mlp_bias=True, num_hidden_layers=2)), causal=True),
        ["gate_proj", "up_proj", "down_proj"],
    ),
    "gpt2": (FAMILIES["gpt2"], ["c_fc", "mlp.c_proj"]),
}
ROUTED = RoutedFFN(num_blocks=4, num_active=2, partition="clustered")


def lora(**options: Any) -> Callable[..., Any]:
    return lambda targets, fan: LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": targets, "fan_in_fan_out": fan, **options}
    )


def of(name: str, **options: Any) -> Callable[..., Any]:
    return lambda targets, fan: getattr(peft, name)(target_modules=targets, **options)


def fan(name: str, **options: Any) -> Callable[..., Any]:
    return lambda targets, fan: getattr(peft, name)(target_modules=targets, fan_in_fan_out=fan, **options)


COUNT: dict[str, Callable[..., Any]] = {
    "lora": lora(),
    "rslora": lora(use_rslora=True),
    "bias": lora(lora_bias=True),
    "bias and dropout": lora(lora_bias=True, lora_dropout=0.3),
    "pissa": lora(init_lora_weights="pissa"),
    "olora": lora(init_lora_weights="olora"),
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "patterns": lambda targets, fan: lora(rank_pattern={targets[0]: 2}, alpha_pattern={targets[1]: 16})(targets, fan),
    "whole linear": lambda targets, fan: LoraConfig(r=4, target_modules=targets[1:], fan_in_fan_out=fan,
                                                    modules_to_save=targets[:1]),
    "adalora": fan("AdaLoraConfig", total_step=10),
}  # fmt: skip
REFUSED: dict[str, tuple[Callable[..., Any], str, tuple[str, ...]]] = {
    "dora": (lora(use_dora=True), "DoRA", ("llama", "gpt2")),
    "parameters": (
        lambda targets, fan: LoraConfig(r=2, target_modules=[], target_parameters=[f"{t}.weight" for t in targets]),
        r"lora\.ParamWrapper",
        ("llama", "gpt2"),
    ),
    "vera": (lambda targets, fan: peft.VeraConfig(r=4, target_modules=targets[:1], fan_in_fan_out=fan), r"vera\.",
             ("llama", "gpt2")),
    "ia3": (lambda targets, fan: peft.IA3Config(target_modules=targets, feedforward_modules=targets[-1:],
                                                fan_in_fan_out=fan), r"ia3\.", ("llama", "gpt2")),
    "fourierft": (fan("FourierFTConfig", n_frequency=10), r"fourierft\.", ("llama", "gpt2")),
    "loha": (of("LoHaConfig", r=4), r"loha\.", ("llama",)),
    "lokr": (of("LoKrConfig", r=4), r"lokr\.", ("llama",)),
    "oft": (of("OFTConfig", oft_block_size=4), r"oft\.", ("llama",)),
    "hra": (of("HRAConfig", r=4), r"hra\.", ("llama",)),
    "miss": (of("MissConfig", r=4), r"miss\.", ("llama",)),
    "randlora": (of("RandLoraConfig", r=4), r"randlora\.", ("llama", "gpt2")),
    "vblora": (of("VBLoRAConfig", r=4, vector_length=16), r"vblora\.", ("llama", "gpt2")),
    "shira": (of("ShiraConfig", r=2), r"shira\.", ("llama",)),
    "c3a": (of("C3AConfig", block_size=16), r"c3a\.", ("llama",)),
}  # fmt: skip


def shake(model: Any) -> None:
    """Give adapters that start as nothing something to do."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "router" not in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1)


def wrapped(kind: str, make: Callable[..., Any], first: bool, config: Any = ROUTED, dtype: Any = None) -> Any:
    """A converted model with its adapter, made in either order, and a batch."""
    case, targets = CASES[kind]
    model, batch = case.model().to(dtype or torch.float32), case.batch(2, 40)
    config_of_adapter = make(targets, kind == "gpt2")
    if first:
        handle = sparsetrain.sparsify(model, config, calibration=[batch])
        if hasattr(config_of_adapter, "modules_to_save"):
            config_of_adapter.modules_to_save = [*(config_of_adapter.modules_to_save or []), *handle.modules_to_save]
        model = get_peft_model(model, config_of_adapter)
    else:
        model = get_peft_model(model, config_of_adapter)
        sparsetrain.sparsify(model, config, calibration=[batch])
    shake(model)
    return model.eval(), batch


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("first", [True, False], ids=["sparsify first", "peft first"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in COUNT for kind in CASES if (name, kind) != ("olora", "gpt2")],  # PEFT's own shapes fail
)
def test_what_is_known_counts_as_its_merged_weights_do(name: str, kind: str, first: bool) -> None:
    model, batch = wrapped(kind, COUNT[name], first)
    outputs = model(**batch).logits.detach()
    with model.disable_adapter():
        without = model(**batch).logits.detach()
    assert (outputs - without).abs().max() > 1e-2
    model.merge_adapter()
    assert_near(model(**batch).logits, outputs)
    with model.disable_adapter():  # while merged: PEFT unmerges
        assert_near(model(**batch).logits, without)
    assert_near(model(**batch).logits, outputs)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("name", ["bias", "adalora", "whole linear"])
def test_every_parameter_of_a_known_adapter_gets_its_gradient(name: str, kind: str) -> None:
    model, batch = wrapped(kind, COUNT[name], True)
    model.train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("first", [True, False], ids=["sparsify first", "peft first"])
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, row in REFUSED.items() for kind in row[2]])
def test_what_is_not_known_is_refused_by_name(name: str, kind: str, first: bool) -> None:
    make, message, _ = REFUSED[name]
    with pytest.raises(ValueError, match=f"routed_ffn.*{message}"):
        model, batch = wrapped(kind, make, first)
        model(**batch)


@pytest.mark.parametrize("kind", CASES)
def test_two_active_adapters_add_up(kind: str) -> None:
    model, batch = wrapped(kind, COUNT["bias"], True)
    targets = CASES[kind][1]
    model.add_adapter("second", lora(r=2, lora_bias=True)(targets, kind == "gpt2"))
    model.base_model.set_adapter(["default", "second"])
    shake(model)
    outputs = model(**batch).logits.detach()
    model.base_model.set_adapter(["default"])
    assert (model(**batch).logits - outputs).abs().max() > 1e-2
    model.base_model.set_adapter(["default", "second"])
    model.merge_adapter()
    assert_near(model(**batch).logits, outputs)


def test_two_adapters_with_dropout_are_refused_in_training_alone() -> None:
    model, batch = wrapped("llama", lora(lora_dropout=0.1), True)
    model.add_adapter("second", lora(lora_dropout=0.1)(CASES["llama"][1], False))
    model.base_model.set_adapter(["default", "second"])
    model.eval()(**batch)
    with pytest.raises(ValueError, match="several active adapters with dropout"):
        model.train()(**batch)


def test_an_adapter_for_each_sample_is_refused() -> None:
    model, batch = wrapped("llama", lora(), True)
    with pytest.raises(ValueError, match="adapter_names"):
        model(**batch, adapter_names=["default", "__base__"])


def test_an_adapter_for_each_sample_is_refused_by_peft_for_a_codebook() -> None:
    case, _ = CASES["llama"]
    model = case.model()
    handle = sparsetrain.sparsify(model, PQAttention.example(), calibration=[case.batch(4)])
    adapted = get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], modules_to_save=handle.modules_to_save)
    ).eval()
    with pytest.raises(TypeError, match="Mixed batching"):
        adapted(**case.batch(2), adapter_names=["default", "__base__"])


def test_a_bias_of_lora_beside_the_published_gate_is_refused() -> None:
    config = RoutedFFN(num_blocks=4, num_active=2, gate="spt", partition="contiguous")
    with pytest.raises(ValueError, match="lora_bias"):
        model, batch = wrapped("gpt2", COUNT["bias"], True, config)
        model(**batch)


@pytest.mark.parametrize("first", [True, False], ids=["sparsify first", "peft first"])
def test_a_warm_up_does_not_put_the_refusal_off(first: bool) -> None:
    config = RoutedFFN(num_blocks=4, num_active=2, partition="contiguous", warmup_ratio=0.5)
    with pytest.raises(ValueError, match=r"vera\."):
        model, batch = wrapped("llama", REFUSED["vera"][0], first, config)
        model.train()(**batch)


@pytest.mark.parametrize("name", ["lokr", "dora", "ia3", "loha"])
def test_at_the_dense_limit_every_adapter_is_exact(name: str) -> None:
    model, batch = wrapped("llama", REFUSED[name][0], True, RoutedFFN(num_blocks=4, num_active=4))
    plain = get_peft_model(CASES["llama"][0].model(), REFUSED[name][0](CASES["llama"][1], False))
    values = dict(model.named_parameters()) | dict(model.named_buffers())
    plain.load_state_dict({key: values[key] for key in plain.state_dict()})
    assert_near(model(**batch).logits, plain.eval()(**batch).logits)


@pytest.mark.parametrize("kind", CASES)
def test_under_autocast_and_beside_half_precision_weights(kind: str) -> None:
    model, batch = wrapped(kind, COUNT["bias"], True)
    expected = model(**batch).logits.detach()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(**batch).logits.float()
    # a token on the border between two blocks may go to the other one
    assert ((mixed - expected).abs() < 0.1).float().mean() > 0.99
    half, batch = wrapped(kind, COUNT["bias"], True, dtype=torch.bfloat16)
    assert any(p.dtype == torch.float32 for name, p in half.named_parameters() if "lora_" in name)
    outputs = half(**batch).logits.float()
    half.merge_adapter()
    assert ((half(**batch).logits.float() - outputs).abs() < 0.1).float().mean() > 0.95


def test_a_linear_of_another_class_is_refused_by_its_class() -> None:
    class Doubling(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    case, _ = CASES["llama"]
    model = case.model()
    sparsetrain.sparsify(model, RoutedFFN(num_blocks=4, num_active=2, partition="contiguous"))
    model.model.layers[1].mlp.up_proj.__class__ = Doubling
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj is a Doubling"):
        model(**case.batch())


def test_a_run_refuses_an_adapter_before_it_trains() -> None:
    values = {"model": "m", "data": "d", "lora_variant": "dora", "methods": [{"method": "routed_ffn", "num_blocks": 4}]}
    recipe, case = Recipe.from_values(values), CASES["llama"][0]
    model = case.model()
    handle = sparsetrain.sparsify(model, *recipe.configs, calibration=[case.batch()])
    with pytest.raises(ValueError, match="DoRA is one"):
        add_lora(model, recipe, handle, [])
