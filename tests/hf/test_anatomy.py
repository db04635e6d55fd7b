"""What an anatomy says of linears, convolutions and FFNs, family by family, against the modules themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sparsetrain import MultiLevel, PQAttention, RoutedFFN, SemiStructured, grow, plan, sparsify
from sparsetrain.core.anatomy import Anatomy, describe, innermost, trained_copy
from sparsetrain.core.errors import UnknownFamily, Unsupported
from sparsetrain.hf.model.attention import attention_function
from tests.families import DIFFUSION, EXPERTS, FAMILIES, FFN, FURTHER, HIDDEN, LAYERS

GATED = {"llama", "mistral", "qwen2", "qwen3", "gemma3"}


def _diffusion(name: str) -> Any:
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return DIFFUSION[name]()


def _assert_linears_are_the_model_s(model: nn.Module, anatomy: Anatomy) -> None:
    names = [linear.name for linear in anatomy.linears]
    assert len(names) == len(set(names))
    for block in anatomy.blocks:
        order = [name for name, _ in model.named_modules() if name in {linear.name for linear in block.linears}]
        assert order == [linear.name for linear in block.linears]
        for linear in block.linears:
            assert linear.layer == block.layer and linear.name.startswith(f"{block.name}.")
            shape = (linear.out_features, linear.in_features)
            weight = innermost(model.get_submodule(linear.name)).weight
            assert weight.shape == (shape[::-1] if linear.transposed else shape), linear.name
            if linear.parts:
                assert sum(width for _, width in linear.parts) == linear.out_features


@pytest.mark.parametrize("family", FAMILIES)
def test_each_linear_of_each_block_has_one_role(family: str) -> None:
    model = FAMILIES[family].model()
    anatomy = describe(model)
    _assert_linears_are_the_model_s(model, anatomy)
    expected = {"q", "k", "v", "o", "up", "down"} | ({"gate"} if family in GATED else set())
    for block in anatomy.blocks:
        roles = [role for linear in block.linears for role in linear.roles]
        assert sorted(roles) == sorted(expected)
        inside = model.get_submodule(block.name).modules()
        assert len(block.linears) == sum(isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D" for m in inside)
        width = {"q": HIDDEN, "o": HIDDEN, "down": HIDDEN, "up": FFN, "gate": FFN}
        for linear in block.linears:
            assert linear.out_features == width.get(linear.role, linear.out_features)


def test_a_fused_projection_says_how_it_splits() -> None:
    fused = [linear for linear in describe(FAMILIES["gpt2"].model()).linears if linear.parts]
    assert len(fused) == LAYERS
    for linear in fused:
        assert linear.role == "qkv" and linear.roles == ("q", "k", "v") and linear.transposed
        assert linear.parts == (("q", HIDDEN), ("k", HIDDEN), ("v", HIDDEN))


def test_a_mixture_of_experts_offers_its_attention() -> None:
    model = EXPERTS["mixtral"]()
    anatomy = describe(model)
    _assert_linears_are_the_model_s(model, anatomy)
    assert [linear.role for linear in anatomy.blocks[0].linears] == ["q", "k", "v", "o"]
    assert all("mixture of experts" in (site.refused or "") for site in anatomy.ffns)


@pytest.mark.parametrize("kind", EXPERTS)
def test_the_attention_of_a_mixture_is_edited_and_its_experts_are_not(kind: str) -> None:
    torch.manual_seed(0)
    model: Any = EXPERTS[kind]().eval()
    batch = {"input_ids": torch.arange(3, 53)[None], "attention_mask": torch.ones(1, 50, dtype=torch.int64)}
    anatomy = describe(model)
    assert all({"q", "k", "v", "o"} == {linear.role for linear in block.linears} for block in anatomy.blocks)
    assert all("mixture of experts" in (site.refused or "") for site in anatomy.ffns)
    expected = model(**batch).logits
    sparsify(model, PQAttention.dense_limit(), calibration=[batch])
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "distilbert"])
def test_peft_changes_names_by_its_prefix_alone(family: str) -> None:
    bare = describe(FAMILIES[family].model())
    model: Any = get_peft_model(FAMILIES[family].model(), LoraConfig(r=2, target_modules="all-linear"))
    anatomy = describe(model)
    _assert_linears_are_the_model_s(model, anatomy)
    assert bare.model == "" and anatomy.model == "base_model.model"
    assert model.get_submodule(anatomy.model) is model.get_base_model()
    assert [linear.name for linear in anatomy.linears] == [f"base_model.model.{linear.name}" for linear in bare.linears]
    assert [linear.roles for linear in anatomy.linears] == [linear.roles for linear in bare.linears]
    wrapped = [hasattr(model.get_submodule(linear.name), "base_layer") for linear in anatomy.linears]
    assert all(wrapped)


def test_the_copy_that_peft_trains() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model: Any = get_peft_model(FAMILIES["llama"].model(), config)
    head = model.base_model.model.lm_head
    assert trained_copy(head) is head.modules_to_save["default"]
    plain = nn.Linear(2, 2)
    assert trained_copy(plain) is plain


@pytest.mark.parametrize("family", FAMILIES)
def test_axes_name_every_weight_of_the_blocks_by_its_sizes(family: str) -> None:
    """The axes that a family's weights had when each row spelled them out."""
    model = FAMILIES[family].model()
    anatomy = describe(model)
    assert all(name in anatomy.axes for name, _ in model.named_parameters())
    weights = {n: p for n, p in model.named_parameters() if n.startswith(tuple(f"{b.name}." for b in anatomy.blocks))}
    attention = anatomy.attentions[0]
    heads, kv_heads = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    sizes = {"heads": {heads, heads + 2 * kv_heads}, "kv_heads": {kv_heads}, "embed": {HIDDEN}, "ffn": {FFN}}
    sizes["head_dim"] = {attention.head_dim}
    for name, parameter in weights.items():
        assert len(anatomy.axes[name]) == parameter.ndim
        assert all(n in sizes[axis] for n, axis in zip(parameter.shape, anatomy.axes[name], strict=True)), name
    for linear in anatomy.linears:
        axes = anatomy.axes[f"{linear.name}.weight"]
        assert (
            axes
            == {
                "q": ("heads", "embed"),
                "k": ("kv_heads", "embed"),
                "v": ("kv_heads", "embed"),
                "qkv": ("embed", "heads"),
                "o": ("heads", "embed") if linear.transposed else ("embed", "heads"),
                "up": ("embed", "ffn") if linear.transposed else ("ffn", "embed"),
                "gate": ("ffn", "embed"),
                "down": ("ffn", "embed") if linear.transposed else ("embed", "ffn"),
            }[linear.role]
        )


def test_an_image_model_s_patches_are_a_convolution() -> None:
    (patches,) = describe(FAMILIES["vit"].model()).convolutions
    assert patches.name.endswith("projection") and patches.layer is None
    assert (patches.in_channels, patches.out_channels, patches.kernel_size) == (3, HIDDEN, (4, 4))
    assert describe(FAMILIES["llama"].model()).convolutions == ()


@pytest.mark.parametrize("name", DIFFUSION)
def test_diffusion_models_have_linears_with_roles(name: str) -> None:
    model = _diffusion(name)
    anatomy = describe(model)
    _assert_linears_are_the_model_s(model, anatomy)
    assert anatomy.family == type(model).__name__ and anatomy.install_attention is None
    for block in anatomy.blocks:
        count = sum(isinstance(module, nn.Linear) for module in model.get_submodule(block.name).modules())
        assert len(block.linears) == count
        roles = [linear.role for linear in block.linears]
        if (site := block.attention) is not None:
            attention = model.get_submodule(site.name)
            assert {"q", "k", "v", "o"} <= set(roles)
            assert (site.num_heads, site.num_heads * site.head_dim) == (attention.heads, attention.to_q.out_features)
            assert site.num_kv_heads == site.num_heads and not site.causal and site.window is None
        assert all(model.get_submodule(norm) is not None for norm in block.norms)


def test_a_dit_is_transformer_blocks() -> None:
    model = _diffusion("dit")
    anatomy = describe(model)
    assert [block.name for block in anatomy.blocks] == [f"transformer_blocks.{i}" for i in range(LAYERS)]
    block = anatomy.blocks[0]
    assert block.attention is not None and block.ffn is not None
    assert (block.attention.name, block.ffn.name) == ("transformer_blocks.0.attn1", "transformer_blocks.0.ff")
    assert block.norms == ("transformer_blocks.0.norm1", "transformer_blocks.0.norm3")
    assert (block.ffn.hidden_size, block.ffn.ffn_size, block.ffn.activation) == (16, 64, "gelu_tanh")
    assert not block.ffn.fused and block.ffn.refused is None
    assert [linear.role for linear in block.linears].count("other") == 3  # the norm's, from time and class
    assert [c.name for c in anatomy.convolutions] == ["pos_embed.proj"]


def test_a_unet_s_blocks_come_in_the_order_of_its_forward() -> None:
    model = _diffusion("unet2d")
    anatomy, ran = describe(model), []
    for block in anatomy.blocks:
        model.get_submodule(block.name).register_forward_hook(lambda *_, name=block.name: ran.append(name))
    model(torch.randn(1, 3, 16, 16), 3)
    assert ran == [block.name for block in anatomy.blocks] and len(ran) == 12
    assert len(anatomy.attentions) == 4 and anatomy.ffns == []


def test_a_unet_s_convolutions() -> None:
    model = _diffusion("unet2d")
    anatomy = describe(model)
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert [site.name for site in anatomy.convolutions] == list(found)
    layers = {f"{block.name}.": block.layer for block in anatomy.blocks}
    for site in anatomy.convolutions:
        module = found[site.name]
        assert (site.out_channels, site.in_channels // site.groups, *site.kernel_size) == module.weight.shape
        assert site.layer == next((n for prefix, n in layers.items() if site.name.startswith(prefix)), None)
    outside = {site.name for site in anatomy.convolutions if site.layer is None}
    assert outside == {"conv_in", "conv_out", "down_blocks.0.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv"}


def test_convolutions_and_blocks_are_seen_through_peft() -> None:
    model = _diffusion("unet2d")
    bare = describe(model)
    config = LoraConfig(r=2, target_modules=["conv1", "conv2", "to_q", "to_v"])
    anatomy = describe(get_peft_model(model, config))
    assert anatomy.model == "base_model.model" and anatomy.family == bare.family
    for sites in ("convolutions", "linears", "blocks"):
        names = [f"base_model.model.{site.name}" for site in getattr(bare, sites)]
        assert [site.name for site in getattr(anatomy, sites)] == names


def test_a_fused_geglu_says_so_and_no_method_takes_it_for_a_plain_ffn() -> None:
    model = _diffusion("transformer2d")
    anatomy = describe(model)
    site = anatomy.ffns[0]
    assert site.fused and site.gate is None and (site.hidden_size, site.ffn_size, site.activation) == (16, 64, "gelu")
    up = next(linear for linear in anatomy.linears if linear.name == f"{site.name}.{site.up}")
    assert up.role == "up_gate" and up.parts == (("up", 64), ("gate", 64))
    x, owner = torch.randn(3, 16), model.get_submodule(site.name)
    value, gate = owner.get_submodule(site.up)(x).split([width for _, width in up.parts], dim=-1)
    torch.testing.assert_close(owner.get_submodule(site.down)(value * nn.functional.gelu(gate)), owner(x))
    for config in (RoutedFFN(num_blocks=4, num_active=2), SemiStructured()):
        with pytest.raises(ValueError, match=rf"{config.method} cannot take {site.name}: GEGLU holds up and gate"):
            plan(model, config)


def test_a_dit_s_ffn_goes_2_4_and_is_not_routed() -> None:
    model = _diffusion("dit")
    with pytest.raises(
        ValueError, match=r"routed_ffn cannot take transformer_blocks\.0\.ff: its activation is part of"
    ):
        plan(model, RoutedFFN(num_blocks=4, num_active=2))
    inputs = {"timestep": torch.tensor([3]), "class_labels": torch.tensor([1])}
    x = torch.randn(1, 4, 8, 8)
    model.eval()
    dense = model(x, **inputs).sample
    handle = sparsify(model, SemiStructured())
    model.train()
    assert not torch.equal(model(x, **inputs).sample, dense)
    handle.restore()
    assert torch.equal(model.eval()(x, **inputs).sample, dense)


def test_an_unknown_diffusion_model_is_named() -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=8,
        caption_projection_dim=8, pooled_projection_dim=8, in_channels=4, out_channels=4,
    )  # fmt: skip
    with pytest.raises(UnknownFamily, match="SD3Transformer2DModel: no block of diffusers that is known"):
        describe(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_other_sizes_and_back(family: str) -> None:
    model = FAMILIES[family].model()
    anatomy, sizes = describe(model), describe(model).sizes
    assert anatomy.resized is not None
    half = {name: size // 2 for name, size in sizes.items() if name != "layers"}
    small = anatomy.resized(model, half, [2])
    assert type(small) is type(model) and describe(small).sizes == {**half, "layers": 1}
    back: Any = anatomy.resized(small, {name: size for name, size in sizes.items() if name != "layers"}, [0, 0, 0])
    assert back.config.to_dict() == model.config.to_dict()
    assert {n: p.shape for n, p in back.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_a_family_that_cannot_be_resized_is_not_grown() -> None:
    model = FURTHER["gemma"].model()
    with pytest.raises(ValueError, match="makes no other sizes"):
        grow(model, MultiLevel())


@pytest.mark.parametrize("asked", [{"softcap": 30.0}, {"s_aux": torch.zeros(2)}])
def test_what_an_attention_asks_for_besides_is_refused_and_not_left_out(asked: dict[str, Any]) -> None:
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(Unsupported, match="asks its attention for"):
        attention_function(nn.Module(), q, q, q, None, **asked)
