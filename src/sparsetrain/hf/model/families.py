"""Model families of transformers, as one table: a row for all families whose blocks are built alike.

To add a family, add a row: the class name of its block, and where, inside the block, the attention, its linears, the
FFN's linears and the norms are. Everything else (sizes, activation, windows) is read from the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Row:
    """How a block is built. Paths are relative to the block; up, gate, down and act to the FFN's owner.

    blocks: class names of the block.
    families: model types with this block that keep the whole contract; mixtures of experts have attention alone to
        offer.
    also: model types that a part of the contract is tested on. They cannot be resized.
    attention: the module that calls the attention function.
    projections: linear of the attention -> its role; a fused one as in `sites.FUSED`. One whose parts lie head by head
        is left out, so no method edits it.
    owner: the module whose forward runs the FFN ("" = the block itself).
    transposed: linears are stored [in, out].
    experts: the FFN is a mixture of experts, and no method's.
    fused: `up` holds gate and up in one linear, in this order; the FFN is then no method's.
    norm_offset: as of `Anatomy`.
    limits: feature -> why no method can have it on these families.
    """

    blocks: tuple[str, ...]
    families: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    attention: str
    projections: Mapping[str, str]
    owner: str = "mlp"
    up: str = ""
    gate: str | None = None
    down: str = ""
    act: str = ""
    norms: tuple[str, ...] = ()
    transposed: bool = False
    experts: bool = False
    fused: bool = False
    norm_offset: float = 0.0
    limits: dict[str, str] = field(default_factory=dict)


_CAUSAL = {"mlm": "a causal language model has no masked-token head"}
_ENCODER = {"packing": "transformers separates packed rows in causal models only. Pad instead"}
_LLAMA = Row(
    blocks=("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"),
    families=("llama", "mistral", "qwen2", "qwen3"),
    attention="self_attn",
    projections={f"self_attn.{role}_proj": role for role in "qkvo"},
    up="up_proj",
    gate="gate_proj",
    down="down_proj",
    act="act_fn",
    norms=("input_layernorm", "post_attention_layernorm"),
    limits=_CAUSAL,
)
_BERT = Row(
    blocks=("BertLayer",),
    families=("bert",),
    attention="attention.self",
    projections={
        "attention.self.query": "q",
        "attention.self.key": "k",
        "attention.self.value": "v",
        "attention.output.dense": "o",
    },
    owner="",
    up="intermediate.dense",
    down="output.dense",
    act="intermediate.intermediate_act_fn",
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    limits=_ENCODER,
)

_VIT = Row(
    blocks=("ViTLayer",),
    families=("vit",),
    attention="attention",
    projections={f"attention.{role}_proj": role for role in "qkvo"},
    up="fc1",
    down="fc2",
    act="activation_fn",
    norms=("layernorm_before", "layernorm_after"),
    limits={name: "images come in one size" for name in ("padding", "packing")}
    | {"mlm": "images have no tokens to mask"},
)


def _further(row: Row, names: Mapping[str, str], **changes: Any) -> Row:
    """A row for blocks (class -> model type) that are built like another's, but for `changes`."""
    return replace(row, blocks=tuple(names), families=(), also=tuple(names.values()), **changes)


_FURTHER = (
    _further(
        _LLAMA,
        {
            "CohereDecoderLayer": "cohere",
            "Cohere2DecoderLayer": "cohere2",
            "Ernie4_5DecoderLayer": "ernie4_5",
            "GraniteDecoderLayer": "granite",
            "HeliumDecoderLayer": "helium",
            "HunYuanDenseV1DecoderLayer": "hunyuan_v1_dense",
            "MinistralDecoderLayer": "ministral",
            "OlmoDecoderLayer": "olmo",
            "SeedOssDecoderLayer": "seed_oss",
            "SmolLM3DecoderLayer": "smollm3",
            "StableLmDecoderLayer": "stablelm",
        },
    ),
    _further(_LLAMA, {"GemmaDecoderLayer": "gemma"}, norm_offset=1.0),
    _further(
        _LLAMA,
        {"Exaone4DecoderLayer": "exaone4", "Olmo2DecoderLayer": "olmo2", "Olmo3DecoderLayer": "olmo3"},
        norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    _further(_LLAMA, {"ArceeDecoderLayer": "arcee"}, gate=None),
    _further(_LLAMA, {"NemotronDecoderLayer": "nemotron"}, gate=None, norm_offset=1.0),
    _further(_LLAMA, {"Starcoder2DecoderLayer": "starcoder2"}, up="c_fc", gate=None, down="c_proj", act="act"),
    _further(
        _LLAMA,
        {"PhiDecoderLayer": "phi"},
        projections={f"self_attn.{role}_proj": role for role in "qkv"} | {"self_attn.dense": "o"},
        up="fc1",
        gate=None,
        down="fc2",
        act="activation_fn",
    ),
    _further(
        _LLAMA,
        {"Phi3DecoderLayer": "phi3"},
        projections={"self_attn.qkv_proj": "qkv", "self_attn.o_proj": "o"},
        up="gate_up_proj",
        gate=None,
        fused=True,
    ),
    _further(
        _LLAMA,
        {"GlmDecoderLayer": "glm", "Glm4DecoderLayer": "glm4"},
        up="gate_up_proj",
        gate=None,
        fused=True,
        norms=(*_LLAMA.norms, "post_self_attn_layernorm", "post_mlp_layernorm"),
    ),
    _further(
        _LLAMA,
        {"GPTNeoXLayer": "gpt_neox"},
        attention="attention",
        projections={"attention.dense": "o"},
        up="dense_h_to_4h",
        gate=None,
        down="dense_4h_to_h",
        act="act",
    ),
    _further(
        _BERT,
        {
            "CamembertLayer": "camembert",
            "ElectraLayer": "electra",
            "ErnieLayer": "ernie",
            "RobertaLayer": "roberta",
            "XLMRobertaLayer": "xlm-roberta",
        },
    ),
    _further(_VIT, {"DeiTLayer": "deit"}),
    _further(_VIT, {"Dinov2Layer": "dinov2"}, norms=("norm1", "norm2")),
)

FAMILIES: tuple[Row, ...] = (
    _LLAMA,
    replace(
        _LLAMA,
        blocks=("Gemma3DecoderLayer",),
        families=("gemma3",),
        norms=(*_LLAMA.norms, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        norm_offset=1.0,
    ),
    Row(
        blocks=("GPT2Block",),
        families=("gpt2",),
        attention="attn",
        projections={"attn.c_attn": "qkv", "attn.c_proj": "o"},
        up="c_fc",
        down="c_proj",
        act="act",
        transposed=True,
        norms=("ln_1", "ln_2"),
        limits=_CAUSAL
        | dict.fromkeys(
            ("four_bit", "eight_bit"),
            "its transposed layers have not been tried quantised. Load the model in bf16 or fp32",
        ),
    ),
    Row(
        blocks=("OPTDecoderLayer",),
        families=("opt",),
        attention="self_attn",
        projections={
            "self_attn.q_proj": "q",
            "self_attn.k_proj": "k",
            "self_attn.v_proj": "v",
            "self_attn.out_proj": "o",
        },
        owner="",
        up="fc1",
        down="fc2",
        act="activation_fn",
        norms=("self_attn_layer_norm", "final_layer_norm"),
        limits=_CAUSAL | {"packing": "positions are counted from the mask, so packed rows cannot restart them"},
    ),
    _BERT,
    replace(
        _BERT,
        blocks=("RobertaPreLayerNormLayer",),
        families=("roberta-prelayernorm",),
        norms=("attention.LayerNorm", "intermediate.LayerNorm"),
    ),
    Row(
        blocks=("TransformerBlock",),
        families=("distilbert",),
        attention="attention",
        projections={
            "attention.q_lin": "q",
            "attention.k_lin": "k",
            "attention.v_lin": "v",
            "attention.out_lin": "o",
        },
        owner="ffn",
        up="lin1",
        down="lin2",
        act="activation",
        norms=("sa_layer_norm", "output_layer_norm"),
        limits=_ENCODER,
    ),
    _VIT,
    Row(
        blocks=(
            *("MixtralDecoderLayer", "Qwen2MoeDecoderLayer", "Qwen3MoeDecoderLayer", "OlmoeDecoderLayer"),
            *("GraniteMoeDecoderLayer", "Glm4MoeDecoderLayer", "Ernie4_5_MoeDecoderLayer"),
        ),
        attention="self_attn",
        projections=_LLAMA.projections,
        experts=True,
        limits=_CAUSAL,
    ),
    *_FURTHER,
)

_ROWS = {block: row for row in FAMILIES for block in row.blocks}


def row_of(module: nn.Module) -> Row | None:
    """The row of a block; None for any other module."""
    # converted OPT and BERT blocks are subclasses of their dense class
    for kind in type(module).__mro__:
        if kind.__name__ in _ROWS and kind.__module__.startswith("transformers."):
            return _ROWS[kind.__name__]
    return None


def family_limits() -> dict[str, dict[str, str]]:
    """Family that keeps the whole contract -> feature -> why no method can have it there."""
    return {family: row.limits for row in FAMILIES for family in row.families}


def further_families() -> dict[str, dict[str, str]]:
    """Family that a part of the contract is tested on -> its limits, as above."""
    return {family: row.limits for row in FAMILIES for family in sorted(row.also)}
