"""Tiny random models of every family, and batches for them. Dropout is off, so that outputs can be compared.

`FAMILIES` are transformers' (all that `family_limits` names), `FURTHER` those that are built like them (all that
`further_families` names), `EXPERTS` mixtures of experts, `DIFFUSION` diffusers'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from sparsetrain.hf.model.families import further_families

VOCAB, HIDDEN, FFN, LAYERS = 61, 32, 48, 3
_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama_config(**changes: Any) -> LlamaConfig:
    """The tiny Llama of these tests, with other sizes where a test needs them."""
    return LlamaConfig(**{**_DECODER, **changes})


@dataclass(frozen=True)
class Family:
    name: str
    build: Callable[[], nn.Module]
    causal: bool
    vision: bool = False
    diffusion: bool = False

    def model(self, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        model: Any = self.build()
        for parameter in model.parameters():  # larger than the default 0.02, so that attention is not uniform
            parameter.data.add_(torch.randn_like(parameter) * 0.08)
        return model.eval()

    def batch(self, rows: int = 2, tokens: int = 100, seed: int = 1) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if self.diffusion:
            return {"sample": torch.randn(rows, 3, 16, 16, generator=generator), "timestep": torch.arange(rows)}
        if self.vision:
            return {"pixel_values": torch.randn(rows, 3, 40, 40, generator=generator)}
        ids = torch.randint(3, VOCAB, (rows, tokens), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _opt() -> nn.Module:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            word_embed_proj_dim=HIDDEN,
            ffn_dim=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=256,
            dropout=0.0,
            attention_dropout=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=256,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=4,
            n_inner=FFN,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _gemma3() -> nn.Module:
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **_DECODER,
            head_dim=8,
            sliding_window=24,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        )
    )


def _bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=256,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def _roberta_prelayernorm() -> nn.Module:
    return RobertaPreLayerNormForSequenceClassification(
        RobertaPreLayerNormConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=256,
            pad_token_id=0,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def _distilbert() -> nn.Module:
    return DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=VOCAB,
            dim=HIDDEN,
            hidden_dim=FFN,
            n_layers=LAYERS,
            n_heads=4,
            max_position_embeddings=256,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
        )
    )


def _vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            image_size=40,
            patch_size=4,
            hidden_size=HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", lambda: LlamaForCausalLM(llama_config()), causal=True),
        Family("qwen2", lambda: Qwen2ForCausalLM(Qwen2Config(**_DECODER)), causal=True),
        Family("qwen3", lambda: Qwen3ForCausalLM(Qwen3Config(**_DECODER, head_dim=8)), causal=True),
        Family("mistral", lambda: MistralForCausalLM(MistralConfig(**_DECODER, sliding_window=40)), causal=True),
        Family("gemma3", _gemma3, causal=True),
        Family("gpt2", _gpt2, causal=True),
        Family("opt", _opt, causal=True),
        Family("bert", _bert, causal=False),
        Family("roberta-prelayernorm", _roberta_prelayernorm, causal=False),
        Family("distilbert", _distilbert, causal=False),
        Family("vit", _vit, causal=False, vision=True),
    )
}
_ENCODER = {
    "vocab_size": VOCAB,
    "embedding_size": HIDDEN,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_IMAGES = {"image_size": 40, "patch_size": 4, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS}
_IMAGES |= {"num_attention_heads": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_IMAGE_CLASSES = {"deit": "DeiTForImageClassification", "dinov2": "Dinov2ForImageClassification"}
_WINDOWS = {"sliding_window": 24, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
_MORE: dict[str, dict[str, Any]] = {
    "cohere2": _WINDOWS,
    "exaone4": _WINDOWS,
    "gemma": {"head_dim": 8},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "gpt_neox": {"num_key_value_heads": None},
    "granite": {"logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "ministral": {
        "head_dim": 8,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "olmo3": _WINDOWS,
    "phi": {"resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "phi3": {"resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "seed_oss": {"head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "starcoder2": {"residual_dropout": 0.0, "embedding_dropout": 0.0},
}


def _further(kind: str) -> Family:
    if kind in ("deit", "dinov2"):
        sizes, model = _IMAGES | ({"intermediate_size": FFN} if kind == "deit" else {"mlp_ratio": 2}), _IMAGE_CLASSES
    elif kind in ("camembert", "electra", "ernie", "roberta", "xlm-roberta"):
        sizes, model = _ENCODER, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    else:
        sizes, model = _DECODER | _MORE.get(kind, {}), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    given = {key: value for key, value in sizes.items() if value is not None}
    return Family(
        kind,
        lambda: getattr(transformers, model[kind])(AutoConfig.for_model(kind, **given)),
        causal=model is MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        vision=model is _IMAGE_CLASSES,
    )


FURTHER = {kind: _further(kind) for kind in further_families()}


def _experts(kind: str, **sizes: Any) -> Callable[[], nn.Module]:
    made = {**_DECODER, "num_experts_per_tok": 2, **sizes}
    return lambda: getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])(AutoConfig.for_model(kind, **made))


EXPERTS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2)),
    "granitemoe": _experts("granitemoe", num_local_experts=4),
    "glm4_moe": _experts(
        "glm4_moe", n_routed_experts=4, moe_intermediate_size=16, n_group=1, topk_group=1, first_k_dense_replace=1
    ),
    "ernie4_5_moe": _experts("ernie4_5_moe", moe_num_experts=4, moe_intermediate_size=16, moe_layer_start_index=1),
}


def _dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=LAYERS,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
    )


def _transformer2d() -> nn.Module:
    """Its FFN is GEGLU, and it attends to a text as well."""
    from diffusers import Transformer2DModel

    return Transformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=16,
        num_layers=LAYERS,
        norm_num_groups=4,
        cross_attention_dim=12,
    )


def _unet2d() -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def _uvit() -> nn.Module:
    from sparsetrain.hf.model.uvit import UViT

    return UViT(sample_size=8, patch_size=2, num_layers=3, num_attention_heads=2, attention_head_dim=8)


UNET = Family("unet2d", _unet2d, causal=False, diffusion=True)
DIFFUSION: dict[str, Callable[[], nn.Module]] = {
    "dit": _dit,
    "transformer2d": _transformer2d,
    "unet2d": _unet2d,
    "uvit": _uvit,
}
