"""Describing the models of diffusers: diffusion transformers and UNets, by the class names of their blocks.

A block is a `BasicTransformerBlock`, or, in a UNet, one attention or one residual unit. diffusers itself is never
imported: it is optional, and a model of it brings it along.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from sparsetrain.core.anatomy import Anatomy, AttentionSite, Block, FFNSite, LinearSite, innermost, submodule
from sparsetrain.core.errors import UnknownFamily
from sparsetrain.core.sites import convolution_sites, linear_site, model_inside, own_modules
from sparsetrain.hf.model.denoising import denoiser_of

_BLOCKS = {"BasicTransformerBlock": "attn1", "Attention": "", "ResnetBlock2D": None, "ResnetBlockCondNorm2D": None}
"""Class of a block -> its self-attention, relative to the block; None: it has none."""

_PROJECTIONS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"}
_ACTIVATIONS = {
    "GELU": ("gelu", False),
    "ApproximateGELU": ("quick_gelu", False),
    "GEGLU": ("gelu", True),
    "SwiGLU": ("silu", True),
}
"""Class of an FFN's first module, which holds `proj` and the activation -> (activation, up and gate are one linear)."""

_LIMITS = {name: "images come in one size" for name in ("padding", "packing")} | {
    "mlm": "images have no tokens to mask",
    "classify": "a diffusion model predicts noise, not classes",
}
_STAGES = ("down_blocks", "mid_block", "up_blocks")
_PLACE = re.compile(rf"\b({'|'.join(_STAGES)})(?:\.(\d+))?\.(\w+)\.(\d+)")


def describe_diffusion(model: nn.Module) -> Anatomy:
    """The anatomy of a diffusers model (bare, or inside PEFT); its family is the class of the model.

    Sparse attention is not installed here yet, so `install_attention` is None.

    Raises:
        UnknownFamily: the model has none of the known blocks.
    """
    inside = model_inside(model)
    found = sorted(_blocks(model), key=lambda pair: _order(pair[0]))
    if not found:
        raise UnknownFamily(
            f"{type(model).__name__}: no block of diffusers that is known here ({', '.join(_BLOCKS)}). "
            "To add one, name its class in sparsetrain/hf/model/diffusion.py with the place of its attention."
        )
    blocks = tuple(_block(name, module, layer) for layer, (name, module) in enumerate(found))
    return Anatomy(
        family=type(denoiser_of(submodule(model, inside))).__name__,
        model_class=type(model).__name__,
        blocks=blocks,
        model=inside,
        convolutions=convolution_sites(model, blocks),
        predictor=denoiser_of,
        limits=_LIMITS,
    )


def _blocks(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Blocks, outermost only. An attention is a block in the `attentions` of a UNet's stage, and else part of one."""
    kind = _kind(root)
    if kind is not None and (kind != "Attention" or ".attentions." in f".{prefix}"):
        yield prefix, root
        return
    for name, child in root.named_children():
        yield from _blocks(child, f"{prefix}.{name}" if prefix else name)


def _kind(module: nn.Module) -> str | None:
    for kind in type(module).__mro__:  # a converted block is a subclass of its dense class
        if kind.__name__ in _BLOCKS and kind.__module__.startswith("diffusers."):
            return kind.__name__
    return None


def _order(name: str) -> tuple[int, ...]:
    """Where in a UNet's forward a block runs; blocks outside its three stages keep their order in the model.

    In a stage, residual unit and attention of one number run one after the other; samplers come last.
    """
    place = _PLACE.search(name)
    if place is None:
        return ()
    stage, index, kind, number = place.groups()
    return (_STAGES.index(stage), int(index or 0), kind.endswith("samplers"), int(number), kind == "attentions")


def _block(name: str, block: nn.Module, layer: int) -> Block:
    attention, ffn = _attention(name, block, layer), _ffn(name, block, layer)
    norms = tuple(f"{name}.{child}" for child, _ in block.named_children() if "norm" in child)
    return Block(
        name=name,
        layer=layer,
        attention=attention,
        ffn=ffn,
        norms=norms,
        linears=tuple(_linears(name, block, layer, ffn)),
    )


def _attention(name: str, block: nn.Module, layer: int) -> AttentionSite | None:
    path = _BLOCKS[_kind(block) or ""]
    if path is None:
        return None
    attention: Any = submodule(block, path)
    head_dim = attention.inner_dim // attention.heads
    return AttentionSite(
        name=f"{name}.{path}" if path else name,
        layer=layer,
        num_heads=attention.heads,
        num_kv_heads=attention.inner_kv_dim // head_dim,
        head_dim=head_dim,
        causal=bool(attention.is_causal),
    )


def _ffn(name: str, block: nn.Module, layer: int) -> FFNSite | None:
    owner: Any = getattr(block, "ff", None)
    if owner is None:
        return None
    first = owner.net[0]
    activation, fused = _ACTIVATIONS.get(type(first).__name__, ("unknown", False))
    if getattr(first, "approximate", "none") == "tanh":
        activation = "gelu_tanh"
    up = linear_site("net.0.proj", first.proj, layer, "up_gate" if fused else "up")
    return FFNSite(
        name=f"{name}.ff",
        layer=layer,
        hidden_size=up.in_features,
        ffn_size=up.out_features // 2 if fused else up.out_features,
        activation=activation,
        up=up.name,
        down="net.2",
        has_bias=innermost(first.proj).bias is not None,
        fused=fused,
        refused=f"{type(first).__name__} holds up and gate in one linear ({up.name})" if fused else None,
    )


def _linears(name: str, block: nn.Module, layer: int, ffn: FFNSite | None) -> Iterator[LinearSite]:
    roles = {} if ffn is None else {f"{ffn.name}.{ffn.up}": "up_gate" if ffn.fused else "up"}
    if ffn is not None:
        roles[f"{ffn.name}.{ffn.down}"] = "down"
    for path, module in own_modules(block, name):
        if isinstance(innermost(module), nn.Linear):
            projection = next((role for end, role in _PROJECTIONS.items() if path.endswith(f".{end}")), "other")
            yield linear_site(path, module, layer, roles.get(path, projection))
