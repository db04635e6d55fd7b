"""Describing the models of transformers (bare, with any head, or inside PEFT) by the table of families."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsetrain.core.anatomy import Anatomy, AttentionSite, Block, FFNSite, LinearSite, innermost, submodule
from sparsetrain.core.axes import axes_of, embedding_scale, last_norm
from sparsetrain.core.errors import UnknownFamily
from sparsetrain.core.sites import convolution_sites, linear_site, model_inside, own_modules
from sparsetrain.hf.model.denoising import denoiser_of
from sparsetrain.hf.model.families import FAMILIES, Row, row_of
from sparsetrain.hf.model.resized import resized

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
    inside = model_inside(model)
    if any(kind.__module__.startswith("diffusers.") for kind in type(denoiser_of(submodule(model, inside))).__mro__):
        from sparsetrain.hf.model.diffusion import describe_diffusion

        return describe_diffusion(model)
    named = dict(model.named_modules())
    blocks = [(name, module, row) for name, module in named.items() if (row := row_of(module)) is not None]
    if not blocks:
        kinds = sorted({kind for m in model.modules() if (kind := type(m).__name__).endswith(("Layer", "Block"))})
        known = sorted(family for row in FAMILIES for family in (*row.families, *row.also))
        raise UnknownFamily(
            f"{type(model).__name__}: no block class is in the table of families. "
            f"Found: {', '.join(kinds) or 'no blocks'}; known families: {', '.join(known)}. To add one, add a row to "
            "FAMILIES in sparsetrain/hf/model/families.py with the places of its attention, FFN linears and norms."
        )
    from sparsetrain.hf.model.attention import install_attention

    described = tuple(_block(name, module, row, layer) for layer, (name, module, row) in enumerate(blocks))
    embedding = _name_of(named, _call(model, "get_input_embeddings"))
    head = _name_of(named, _call(model, "get_output_embeddings"))
    axes, reads = axes_of(described, embedding, head, model)
    return Anatomy(
        family=str(getattr(getattr(model, "config", None), "model_type", "unknown")),
        model_class=type(model).__name__,
        blocks=described,
        embedding=embedding,
        head=head,
        model=inside,
        convolutions=convolution_sites(model, described),
        install_attention=install_attention,
        keep_record=_keep_record,
        axes=axes,
        reads=reads,
        last_norm=last_norm(described, axes),
        norm_offset=blocks[0][2].norm_offset,
        embedding_scale=embedding_scale(named.get(embedding or "")),
        resized=resized if blocks[0][2].families else None,
        limits=blocks[0][2].limits,
    )


def _keep_record() -> None:
    # they bring PEFT and the Trainer, which a plan can do without
    from sparsetrain.hf.model.any_trainer import take_part
    from sparsetrain.hf.model.saving import keep_record

    keep_record()
    take_part()


def _block(name: str, block: nn.Module, row: Row, layer: int) -> Block:
    attention = _attention(f"{name}.{row.attention}", block.get_submodule(row.attention), layer)
    ffn = _ffn(name, block, row, layer)
    return Block(
        name=name,
        layer=layer,
        attention=attention,
        ffn=ffn,
        norms=tuple(f"{name}.{norm}" for norm in row.norms if _has(block, norm)),  # parallel blocks have one
        linears=_linears(name, block, row, attention, ffn),
    )


def _linears(name: str, block: nn.Module, row: Row, attention: AttentionSite, ffn: FFNSite) -> tuple[LinearSite, ...]:
    roles = {f"{name}.{path}": role for path, role in row.projections.items()}
    if ffn.up:
        up = "gate_up" if row.fused else "up"
        roles |= {f"{ffn.name}.{ffn.up}": up, f"{ffn.name}.{ffn.gate}": "gate", f"{ffn.name}.{ffn.down}": "down"}
    return tuple(
        linear_site(path, module, attention.layer, roles[path], attention, row.transposed)
        for path, module in own_modules(block, name)
        if path in roles
    )


def _attention(name: str, module: nn.Module, layer: int) -> AttentionSite:
    config: Any = module.config
    heads = config.num_attention_heads
    head_dim = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None)
    window = getattr(module, "sliding_window", None) if getattr(module, "is_sliding", True) else None
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


def _ffn(name: str, block: nn.Module, row: Row, layer: int) -> FFNSite:
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
    role = "gate_up" if row.fused else "up"
    up = linear_site(row.up, owner.get_submodule(row.up), layer, role, transposed=row.transposed)
    return FFNSite(
        name=owner_name,
        layer=layer,
        hidden_size=up.in_features,
        ffn_size=up.out_features // 2 if row.fused else up.out_features,
        activation=_activation(config),
        up=row.up,
        gate=row.gate,
        down=row.down,
        bypass=(row.act,),
        transposed=row.transposed,
        has_bias=innermost(owner.get_submodule(row.up)).bias is not None,
        fused=row.fused,
        refused=f"{type(owner).__name__} holds gate and up in one linear ({row.up})" if row.fused else None,
    )


def _activation(config: Any) -> str:
    for name in ("hidden_act", "activation_function", "hidden_activation", "activation"):
        value = getattr(config, name, None)
        if isinstance(value, str):
            return _ACTIVATIONS.get(value, value)
    return "unknown"


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
