"""Model families of transformers, as a table: one row a block class.

To add a family, add a row: the class name of its block, and where, inside the block, the attention, the FFN's linears
and the norms are. Everything else (sizes, activation, windows) is read from the config.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sparsetrain.core.anatomy import Anatomy, AttentionSite, Block, FFNSite
from sparsetrain.core.errors import UnknownFamily


@dataclass(frozen=True, kw_only=True)
class Row:
    """Paths relative to the block; up, gate, down and act relative to the FFN's owner ("" = the block itself)."""

    attention: str
    owner: str
    up: str
    down: str
    act: str
    gate: str | None = None
    transposed: bool = False
    norms: tuple[str, ...] = ()
    experts: bool = False
    limits: dict[str, str] = field(default_factory=dict)
    attention_axes: dict[str, str] = field(default_factory=dict)


_CAUSAL = {"mlm": "a causal language model has no masked-token head"}
_ENCODER = {"packing": "transformers separates packed rows in causal models only. Pad instead"}
_QKVO = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "out_proj": "o"}
_LLAMA = Row(
    attention="self_attn",
    owner="mlp",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
    act="act_fn",
    norms=("input_layernorm", "post_attention_layernorm"),
    attention_axes=_QKVO,
    limits=_CAUSAL,
)
_MOE = Row(attention="self_attn", owner="mlp", up="", down="", act="", experts=True, limits=_CAUSAL)

FAMILIES: dict[str, Row] = {
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA,
    "Gemma3DecoderLayer": Row(
        attention="self_attn",
        owner="mlp",
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
        act="act_fn",
        norms=(
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
        attention_axes=_QKVO,
        limits=_CAUSAL,
    ),
    "GPT2Block": Row(
        attention="attn",
        owner="mlp",
        up="c_fc",
        down="c_proj",
        act="act",
        transposed=True,
        norms=("ln_1", "ln_2"),
        attention_axes={"c_attn": "qkv", "c_proj": "o"},
        limits=_CAUSAL
        | {"four_bit": "its transposed layers have not been tried in 4 bits. Load the model in bf16 or fp32"},
    ),
    "OPTDecoderLayer": Row(
        attention="self_attn",
        owner="",
        up="fc1",
        down="fc2",
        act="activation_fn",
        norms=("self_attn_layer_norm", "final_layer_norm"),
        attention_axes=_QKVO,
        limits=_CAUSAL | {"packing": "positions are counted from the mask, so packed rows cannot restart them"},
    ),
    "BertLayer": Row(
        attention="attention.self",
        owner="",
        up="intermediate.dense",
        down="output.dense",
        act="intermediate.intermediate_act_fn",
        norms=("attention.output.LayerNorm", "output.LayerNorm"),
        attention_axes={"query": "q", "key": "k", "value": "v"},
        limits=_ENCODER,
    ),
    "RobertaPreLayerNormLayer": Row(
        attention="attention.self",
        owner="",
        up="intermediate.dense",
        down="output.dense",
        act="intermediate.intermediate_act_fn",
        norms=("attention.LayerNorm", "intermediate.LayerNorm"),
        attention_axes={"query": "q", "key": "k", "value": "v"},
        limits=_ENCODER,
    ),
    "TransformerBlock": Row(  # DistilBERT
        attention="attention",
        owner="ffn",
        up="lin1",
        down="lin2",
        act="activation",
        norms=("sa_layer_norm", "output_layer_norm"),
        attention_axes={"q_lin": "q", "k_lin": "k", "v_lin": "v", "out_lin": "o"},
        limits=_ENCODER,
    ),
    "ViTLayer": Row(
        attention="attention",
        owner="mlp",
        up="fc1",
        down="fc2",
        act="activation_fn",
        norms=("layernorm_before", "layernorm_after"),
        attention_axes=_QKVO,
        limits={name: "images come in one size" for name in ("padding", "packing")}
        | {"mlm": "images have no tokens to mask"},
    ),
    "MixtralDecoderLayer": _MOE,
    "Qwen2MoeDecoderLayer": _MOE,
    "Qwen3MoeDecoderLayer": _MOE,
    "OlmoeDecoderLayer": _MOE,
}

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}


def describe_model(model: nn.Module) -> Anatomy:
    """The anatomy of a transformers model (bare, with any head, or inside PEFT).

    Raises:
        UnknownFamily: no block of the model has a row in `FAMILIES`.
    """
    blocks = [(name, module, row) for name, module in model.named_modules() if (row := _row(module)) is not None]
    if not blocks:
        kinds = sorted(
            {type(m).__name__ for _, m in model.named_modules() if type(m).__name__.endswith(("Layer", "Block"))}
        )
        raise UnknownFamily(
            f"{type(model).__name__}: no block class is in the table of families. "
            f"Found: {', '.join(kinds) or 'no blocks'}; known: {', '.join(FAMILIES)}. To add a family, add a row to "
            "FAMILIES in sparsetrain/hf/model/anatomy.py with the places of its attention, FFN linears and norms."
        )
    from sparsetrain.hf.model.attention import install_attention

    described = tuple(_block(name, module, row, layer) for layer, (name, module, row) in enumerate(blocks))
    named = dict(model.named_modules())
    embedding = _name_of(named, _call(model, "get_input_embeddings"))
    head = _name_of(named, _call(model, "get_output_embeddings"))
    return Anatomy(
        family=str(getattr(getattr(model, "config", None), "model_type", "unknown")),
        model_class=type(model).__name__,
        blocks=described,
        embedding=embedding,
        head=head,
        install_attention=install_attention,
        axes=_axes(blocks, described, embedding, head, model),
        limits=blocks[0][2].limits,
    )


MODEL_TYPES = {
    "llama": "LlamaDecoderLayer",
    "mistral": "MistralDecoderLayer",
    "qwen2": "Qwen2DecoderLayer",
    "qwen3": "Qwen3DecoderLayer",
    "gemma3": "Gemma3DecoderLayer",
    "gpt2": "GPT2Block",
    "opt": "OPTDecoderLayer",
    "bert": "BertLayer",
    "roberta-prelayernorm": "RobertaPreLayerNormLayer",
    "distilbert": "TransformerBlock",
    "vit": "ViTLayer",
}
"""Family, as the docs name it -> its block; mixtures of experts have attention alone to offer."""


def family_limits() -> dict[str, dict[str, str]]:
    """Family -> feature -> why no method can have it there."""
    return {family: FAMILIES[block].limits for family, block in MODEL_TYPES.items()}


def _row(module: nn.Module) -> Row | None:
    # converted OPT and BERT blocks are subclasses of their dense class
    for kind in type(module).__mro__:
        if kind.__name__ in FAMILIES and kind.__module__.startswith("transformers."):
            return FAMILIES[kind.__name__]
    return None


def _block(name: str, block: nn.Module, row: Row, layer: int) -> Block:
    attention_name = f"{name}.{row.attention}"
    attention = block.get_submodule(row.attention)
    return Block(
        name=name,
        layer=layer,
        attention=_attention(attention_name, attention, layer),
        ffn=_ffn(name, block, row, layer),
        norms=tuple(f"{name}.{norm}" for norm in row.norms),
    )


def _attention(name: str, module: nn.Module, layer: int) -> AttentionSite:
    config: Any = module.config
    heads = config.num_attention_heads
    head_dim = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None)
    window = getattr(module, "sliding_window", None)
    if window is None and getattr(config, "model_type", "") == "mistral":
        window = getattr(config, "sliding_window", None)
    return AttentionSite(
        name=name,
        layer=layer,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim or getattr(config, "head_dim", None) or config.hidden_size // heads,
        causal=bool(getattr(module, "is_causal", True)),
        window=window,
        dropout=_dropout(module),
    )


def _dropout(module: nn.Module) -> float:
    for name in ("attention_dropout", "attn_dropout", "dropout"):
        value = getattr(module, name, None)
        if isinstance(value, nn.Dropout):
            return float(value.p)
        if isinstance(value, float):
            return value
    return 0.0


def _ffn(name: str, block: nn.Module, row: Row, layer: int) -> FFNSite | None:
    owner_name = f"{name}.{row.owner}" if row.owner else name
    config: Any = block.get_submodule(row.attention).config
    owner = block.get_submodule(row.owner) if row.owner and hasattr(block, row.owner) else block
    if row.experts or hasattr(owner, "experts") or not _has(owner, row.up):
        return FFNSite(
            name=owner_name,
            layer=layer,
            hidden_size=config.hidden_size,
            ffn_size=0,
            activation="",
            up="",
            down="",
            refused=f"{type(owner).__name__} is a mixture of experts: it is routed already",
        )
    up = owner.get_submodule(row.up)
    weight = _inner(up).weight
    ffn_size, hidden = (weight.shape[1], weight.shape[0]) if row.transposed else weight.shape
    return FFNSite(
        name=owner_name,
        layer=layer,
        hidden_size=int(hidden),
        ffn_size=int(ffn_size),
        activation=_activation(config),
        up=row.up,
        gate=row.gate,
        down=row.down,
        bypass=(row.act,),
        transposed=row.transposed,
        has_bias=_inner(up).bias is not None,
    )


def _activation(config: Any) -> str:
    for name in ("hidden_act", "activation_function", "hidden_activation", "activation"):
        value = getattr(config, name, None)
        if isinstance(value, str):
            return _ACTIVATIONS.get(value, value)
    return "unknown"


def _axes(
    blocks: list[tuple[str, nn.Module, Row]],
    described: tuple[Block, ...],
    embedding: str | None,
    head: str | None,
    model: nn.Module,
) -> dict[str, tuple[str, ...]]:
    """Axes of the parameters that the table names; a parameter without a rule is left out."""
    axes: dict[str, tuple[str, ...]] = {}

    def linear(name: str, out_axis: str, in_axis: str, transposed: bool) -> None:
        axes[f"{name}.weight"] = (in_axis, out_axis) if transposed else (out_axis, in_axis)
        axes[f"{name}.bias"] = (out_axis,)

    for (name, _, row), block in zip(blocks, described, strict=True):
        for child, role in row.attention_axes.items():
            out = {"q": "heads", "k": "kv_heads", "v": "kv_heads", "qkv": "heads", "o": "embed"}[role]
            linear(f"{name}.{row.attention}.{child}", out, "heads" if role == "o" else "embed", row.transposed)
        if row.attention == "attention.self":
            linear(f"{name}.attention.output.dense", "embed", "heads", False)
        if block.ffn is not None and block.ffn.refused is None:
            for child, out, into in ((row.up, "ffn", "embed"), (row.gate, "ffn", "embed"), (row.down, "embed", "ffn")):
                if child:
                    linear(f"{block.ffn.name}.{child}", out, into, row.transposed)
        for norm in block.norms:
            axes[f"{norm}.weight"] = axes[f"{norm}.bias"] = ("embed",)
    if embedding:
        axes[f"{embedding}.weight"] = ("vocab", "embed")
    if head:
        axes[f"{head}.weight"], axes[f"{head}.bias"] = ("vocab", "embed"), ("vocab",)
    known = {name for name, _ in model.named_parameters()}
    return {name: value for name, value in axes.items() if name in known}


def _inner(module: nn.Module) -> Any:
    while hasattr(module, "base_layer"):
        module = module.base_layer  # type: ignore[assignment]
    return module


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return bool(path)


def _call(model: nn.Module, method: str) -> nn.Module | None:
    try:
        return getattr(model, method)()
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _name_of(named: dict[str, nn.Module], module: nn.Module | None) -> str | None:
    return next((name for name, found in named.items() if found is module), None) if module is not None else None
