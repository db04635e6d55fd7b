"""Anatomy: where a model's blocks, attentions, FFNs, embedding and head are.

Methods are written against this, never against a model class. Adapters (`hf/model/anatomy.py`) register from above: a
model whose module starts with a registered prefix is described by the function registered for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module

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
class FFNSite:
    """One feed-forward network: `name` is its owner, the module whose forward runs it.

    up, gate, down: names of the linears relative to the owner (gate is None when the FFN is not gated).
    bypass: names, relative to the owner, of what stands between up and down (activation, and nothing that drops).
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
    refused: str | None = None


@dataclass(frozen=True, kw_only=True)
class Block:
    """One Transformer block; blocks are counted from 0 in the order of execution."""

    name: str
    layer: int
    attention: AttentionSite | None
    ffn: FFNSite | None
    norms: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The places of one model.

    install_attention: makes every attention of the model ask for a stand-in (`surgery.attention`), and be dense where
    there is none; returns its own undo. None when the adapter cannot.
    limits: feature (of `surgery.support`) -> why no method can have it on this family.
    axes: parameter name -> the axes of its dimensions, among heads, kv_heads, embed, ffn, vocab, positions.
    """

    family: str
    model_class: str
    blocks: tuple[Block, ...]
    embedding: str | None = None
    head: str | None = None
    install_attention: Callable[[nn.Module], Undo] | None = None
    axes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    limits: dict[str, str] = field(default_factory=dict)

    @property
    def attentions(self) -> list[AttentionSite]:
        return [block.attention for block in self.blocks if block.attention is not None]

    @property
    def ffns(self) -> list[FFNSite]:
        return [block.ffn for block in self.blocks if block.ffn is not None]


Describe = Callable[[nn.Module], Anatomy]
# module prefix of a model's class -> "module:function" of the adapter, imported when first needed
_SOURCES: dict[str, str] = {name: "sparsetrain.hf.model.anatomy:describe_model" for name in ("transformers", "peft")}


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


def submodule(model: nn.Module, name: str) -> nn.Module:
    """`model.get_submodule` that also takes the empty name."""
    return model.get_submodule(name) if name else model


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a linear, seen through adapters that keep the original under `base_layer`."""
    while hasattr(module, "base_layer"):
        module = module.base_layer  # type: ignore[assignment]
    return module.weight  # type: ignore[return-value]
