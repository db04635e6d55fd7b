"""Anatomy: where a model's blocks, attentions, FFNs, linears, convolutions, embedding and head are.

Methods are written against this, never against a model class. Adapters register from above (`hf/model/anatomy.py`,
`hf/model/diffusion.py`): a model whose module starts with a registered prefix is described by the function registered
for it. Names are of the modules as they stand in the model: a linear that PEFT has wrapped keeps its name, and
`innermost` finds the linear itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from sparsetrain.core.errors import UnknownFamily

Undo = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """One attention: `name` is the module that calls the attention function.

    `window` is the sliding window in tokens (None: all). `dropout` is the probability used in training.
    """

    name: str
    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool
    window: int | None = None
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LinearSite:
    """One linear of a block.

    role: q, k, v, o (attention), up, gate, down (FFN), other (what a family has besides), or of a fused projection the
        roles in it, as `qkv`, `up_gate` or `gate_up`; `roles` lists them.
    transposed: the weight is stored [in, out] (GPT-2's Conv1D).
    parts: of a fused projection, (role, number of output features) in the order they lie; empty when it is one thing.
    """

    name: str
    layer: int
    role: str
    in_features: int
    out_features: int
    transposed: bool = False
    parts: tuple[tuple[str, int], ...] = ()

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(role for role, _ in self.parts) or (self.role,)


@dataclass(frozen=True, kw_only=True)
class ConvolutionSite:
    """One convolution; its layer is that of the block it stands in, None outside the blocks."""

    name: str
    layer: int | None
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    groups: int = 1


@dataclass(frozen=True, kw_only=True)
class FFNSite:
    """One feed-forward network: `name` is its owner, the module whose forward runs it.

    up, gate, down: names of the linears relative to the owner (gate is None when the FFN is not gated).
    bypass: names, relative to the owner, of what stands between up and down (activation, and nothing that drops);
        empty when the activation is no module of its own.
    fused: `up` holds up and gate in one linear, [2 * ffn_size, hidden_size], up first; `gate` is then None.
    transposed: weights are stored [in, out] (GPT-2's Conv1D).
    refused: why no method may edit this FFN, or None.
    """

    name: str
    layer: int
    hidden_size: int
    ffn_size: int
    activation: str
    up: str
    down: str
    gate: str | None = None
    bypass: tuple[str, ...] = ()
    transposed: bool = False
    has_bias: bool = False
    fused: bool = False
    refused: str | None = None


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block (of a UNet: one attention or one residual unit); counted from 0 in the order of execution.

    linears: its linears in model order, cross-attention's included, a mixture's experts not.
    """

    name: str
    layer: int
    attention: AttentionSite | None
    ffn: FFNSite | None
    norms: tuple[str, ...] = ()
    linears: tuple[LinearSite, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The places of one model.

    model: name of the library's own model inside the described one, whose forward takes labels: "" when it is that
        model itself, "base_model.model" inside PEFT ("base_model" where PEFT only learns a prompt).
    convolutions: in model order, those outside the blocks included.
    install_attention: makes every attention of the model ask for a stand-in (`surgery.attention`), and be dense where
    there is none; returns its own undo. None when the adapter cannot.
    predictor: model -> what in it predicts of given inputs, drawing nothing and without a loss (the denoiser of a model
        that adds the noise itself); None: the model does.
    limits: feature (of `surgery.support`) -> why no method can have it on this family.
    keep_record: lets the library's own saving, loading and training see to what is in no state dict (`surgery.record`).
    axes: parameter name -> the axes of its dimensions: heads, kv_heads, embed, ffn, which `sizes` counts (a dimension
        may hold several copies, one after the other: a fused q, k, v), and what no method resizes: head_dim, vocab,
        positions, types, labels, classifier, channels, patch, one. A parameter without a rule is left out.
    reads: name of a weight that multiplies its input -> the dimension along which it does. Tied weights count as the
        embedding, and are not in it.
    last_norm: the norm whose output the head reads, outside the blocks.
    norm_offset: what the norms add to their weights (1 where weights are stored as deviations from 1).
    embedding_scale: what the embedding multiplies its rows by; it may depend on the width.
    resized: (model, sizes, for each new layer the old one whose own settings it has) -> a new random model of its
        class. The sizes of the model that it was made from give that one's very config again, unless it is made with
        `remembers=False`.
    """

    family: str
    model_class: str
    blocks: tuple[Block, ...]
    embedding: str | None = None
    head: str | None = None
    model: str = ""
    convolutions: tuple[ConvolutionSite, ...] = ()
    install_attention: Callable[[nn.Module], Undo] | None = None
    keep_record: Callable[[], None] | None = None
    axes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    reads: dict[str, int] = field(default_factory=dict)
    last_norm: str | None = None
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    resized: Callable[..., nn.Module] | None = None
    predictor: Callable[[nn.Module], nn.Module] | None = None
    limits: dict[str, str] = field(default_factory=dict)

    @property
    def attentions(self) -> list[AttentionSite]:
        return [block.attention for block in self.blocks if block.attention is not None]

    @property
    def ffns(self) -> list[FFNSite]:
        return [block.ffn for block in self.blocks if block.ffn is not None]

    @property
    def linears(self) -> list[LinearSite]:
        """The linears of all blocks; the output head is not among them."""
        return [linear for block in self.blocks for linear in block.linears]

    @property
    def sizes(self) -> dict[str, int]:
        """Axis -> size: heads and kv_heads (each of `head_dim` features), embed, ffn, and layers.

        Raises:
            ValueError: the blocks differ in size, or lack an attention or an FFN that a method may edit.
        """
        found = {
            (a.num_heads, a.num_kv_heads, f.hidden_size, f.ffn_size)
            for block in self.blocks
            if (a := block.attention) is not None and (f := block.ffn) is not None and f.refused is None
        }
        whole = len(self.attentions) == len(self.ffns) == len(self.blocks)
        if len(found) != 1 or not whole or any(ffn.refused for ffn in self.ffns):
            raise ValueError(
                f"{self.model_class}: its {len(self.blocks)} blocks have no one size (heads, kv_heads, embed, ffn: "
                f"{sorted(found)}), so it cannot be resized. Take a model whose blocks are alike."
            )
        return dict(zip(("heads", "kv_heads", "embed", "ffn"), found.pop(), strict=True), layers=len(self.blocks))


Describe = Callable[[nn.Module], Anatomy]
# module prefix of a model's class -> "module:function" of the adapter, imported when first needed
_SOURCES: dict[str, str] = {
    "transformers": "sparsetrain.hf.model.anatomy:describe_model",
    "peft": "sparsetrain.hf.model.anatomy:describe_model",
    "diffusers": "sparsetrain.hf.model.diffusion:describe_diffusion",
}


def register_anatomy(module_prefix: str, function: str) -> None:
    """Describe models whose class lives under `module_prefix` with `function` ("package.module:name")."""
    _SOURCES[module_prefix] = function


def describe(model: nn.Module) -> Anatomy:
    """The anatomy of a model.

    A model outside the registered libraries can describe itself with a method `anatomy()`.

    Raises:
        UnknownFamily: no adapter knows the model's class.
    """
    own = getattr(model, "anatomy", None)
    if callable(own):
        return own()  # type: ignore[return-value]
    for kind in type(model).__mro__:
        for prefix, target in _SOURCES.items():
            if kind.__module__ == prefix or kind.__module__.startswith(prefix + "."):
                module, _, name = target.partition(":")
                return getattr(import_module(module), name)(model)
    raise UnknownFamily(
        f"{type(model).__name__} (module {type(model).__module__}) is not a model that an adapter describes. "
        f"Known libraries: {', '.join(_SOURCES) or 'none'}. Give the model a method anatomy() -> sparsetrain Anatomy, "
        "or register_anatomy() for its library."
    )


def known_parts(model: nn.Module) -> Anatomy:
    """The anatomy; of a family that no adapter knows its blocks alone, so that dense training is planned and measured.

    Its blocks are the entries of the list of modules that holds the most parameters.
    """
    try:
        return describe(model)
    except UnknownFamily:
        names = _largest_list(model)
        return Anatomy(
            family=str(getattr(getattr(model, "config", None), "model_type", "unknown")),
            model_class=type(model).__name__,
            blocks=tuple(Block(name=name, layer=layer, attention=None, ffn=None) for layer, name in enumerate(names)),
        )


def _largest_list(model: nn.Module) -> list[str]:
    """Names of the modules in the largest list that stands in no other."""
    lists: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(name.startswith(f"{over}.") for over in lists):
            lists[name] = module
    if not lists:
        return []
    largest = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return [f"{largest}.{i}" for i in range(len(lists[largest]))]  # type: ignore[arg-type]


def submodule(model: nn.Module, name: str) -> nn.Module:
    """`model.get_submodule` that also takes the empty name."""
    return model.get_submodule(name) if name else model


def library_model(model: nn.Module) -> nn.Module:
    """The library's own model: inside PEFT what it wraps, else the model itself."""
    return submodule(model, describe(model).model)


def innermost(module: nn.Module) -> Any:
    """The module under all adapters, which keep what they wrap as `base_layer` (PEFT)."""
    wrapped: Any = module
    while (inside := wrapped._modules.get("base_layer")) is not None:  # hasattr() of what is missing costs 3 us
        wrapped = inside
    return wrapped


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a linear, seen through adapters."""
    return innermost(module).weight


def trained_copy(module: nn.Module) -> Any:
    """Of a module that PEFT keeps in `modules_to_save`, the copy that it trains; any other module itself."""
    copies: Any = getattr(module, "modules_to_save", None)
    return module if copies is None else copies[module.active_adapters[0]]  # type: ignore[index, operator]
