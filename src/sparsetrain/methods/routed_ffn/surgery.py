"""How the routed FFN meets a model: its edits, their costs, and the conversion from calibration data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, FFNSite, Undo, dense_weight, innermost, submodule
from sparsetrain.core.cost import Cost, ffn_cost
from sparsetrain.methods.routed_ffn.calibrate import convert_sites
from sparsetrain.methods.routed_ffn.config import RoutedFFN
from sparsetrain.methods.routed_ffn.distillation import distill
from sparsetrain.methods.routed_ffn.module import NotesPadding, Routed, Router, Routing
from sparsetrain.methods.routed_ffn.permute import permute_units
from sparsetrain.ops.routed_ffn import ACTIVATIONS
from sparsetrain.surgery.edits import edits_at
from sparsetrain.surgery.lora import refused_adapter
from sparsetrain.surgery.method import QUANTISED, Edit, Method, Progress, State, register_method
from sparsetrain.surgery.reclass import declass, reclass
from sparsetrain.surgery.site import Site
from sparsetrain.surgery.targets import at_most_dense, refuse_rows, see_targets


def edits(config: RoutedFFN, anatomy: Anatomy, model: nn.Module) -> list[Edit]:
    """One edit for each FFN the config takes.

    Raises:
        ValueError: a mixture-of-experts FFN, an unknown activation, or sizes that do not divide.
    """
    blocks = {block.ffn.name: block.name for block in anatomy.blocks if block.ffn is not None}
    return edits_at(
        config,
        anatomy,
        anatomy.ffns,
        lambda m, t, _config, site: install(m, t, config, site, blocks[site.name], anatomy),
        check=lambda site: _check(config, site, model),
        cost=lambda site, _tokens: costs(config, site),
        claims=_claims,
        blank=(lambda site: blank(config, site)) if config.needs_calibration else None,
        note=lambda _site: _note(config),
    )


def _note(config: RoutedFFN) -> str:
    active = f"{config.num_active} of {config.num_blocks} blocks, β={config.active_ratio:.2f}"
    return active + ("" if config.dense_tokens == "none" else "; targets dense, at most this")


def _check(config: RoutedFFN, site: FFNSite, model: nn.Module) -> None:
    if site.refused:
        raise ValueError(f"routed_ffn cannot take {site.name}: {site.refused}. Leave it out with `targets`.")
    if not site.bypass:
        raise ValueError(
            f"routed_ffn cannot take {site.name}: its activation is part of the module around {site.up}, and routing "
            "needs one of its own. Leave it out with `targets`."
        )
    if site.activation not in ACTIVATIONS:
        raise ValueError(
            f"routed_ffn cannot take {site.name}: activation {site.activation!r} is not one of {sorted(ACTIVATIONS)}."
        )
    config.split(site.ffn_size)
    for name in _claims(site):
        linear = submodule(model, name)
        if innermost(linear) is not linear and (reason := refused_adapter(linear)):
            raise ValueError(f"routed_ffn cannot take {site.name}: {name} {reason}")


def _claims(site: FFNSite) -> list[str]:
    return [f"{site.name}.{linear}" for linear in (site.up, site.gate, site.down) if linear]


def costs(config: RoutedFFN, site: FFNSite) -> tuple[Cost, Cost]:
    """(dense, routed) per token. Routed: the router, the active units' GEMMs, and their pre-activations saved."""
    matrices = 3 if site.gate else 2
    bias = (matrices - 1) * site.ffn_size + site.hidden_size if site.has_bias else 0
    dense = ffn_cost(site.hidden_size, site.ffn_size, site.gate is not None, bias)
    if config.num_active == config.num_blocks:
        return dense, dense
    shared, width = config.split(site.ffn_size)
    units = shared + width * config.num_active
    router = config.num_blocks * (site.hidden_size + 1)
    choosing = 2.0 * site.hidden_size * config.num_blocks
    if config.compensated_by != "none":
        router += config.num_blocks * site.hidden_size
        choosing += 2.0 * config.num_blocks * site.hidden_size
    router += 2 * config.rank(site.hidden_size) * site.hidden_size
    choosing += 4.0 * config.rank(site.hidden_size) * site.hidden_size
    flops = 2.0 * matrices * site.hidden_size * units + choosing
    saved = site.hidden_size + (2 if site.gate else 1) * units + 3 * config.num_active
    routed = Cost(num_params=dense.num_params + router, flops=flops, saved_elements=saved)
    return dense, at_most_dense(config, dense, routed, choosing)


def _router(config: RoutedFFN, site: FFNSite) -> Router:
    return Router(
        site.hidden_size,
        config.num_blocks,
        shift=config.compensated_by != "none",
        rank=config.rank(site.hidden_size),
    )


def blank(config: RoutedFFN, site: FFNSite) -> dict[str, Tensor]:
    """What `prepare` would find for a site: its order of units and its router, here as they stand."""
    router = {f"router.{name}": value.detach() for name, value in _router(config, site).named_parameters()}
    return {"order": torch.arange(site.ffn_size), **router}


def install(
    model: nn.Module, tensors: dict[str, Tensor], config: RoutedFFN, site: FFNSite, block_name: str, anatomy: Anatomy
) -> tuple[Undo, Site]:
    """Reorder the units, add the router, and give the owner its new forward."""
    owner, block = submodule(model, site.name), submodule(model, block_name)
    weight = dense_weight(owner.get_submodule(site.up))
    order = tensors.get("order")
    router = _router(config, site)
    saved = {name.removeprefix("router."): value for name, value in tensors.items() if name.startswith("router.")}
    if saved:
        router.load_state_dict(saved)
    elif config.needs_calibration:
        raise ValueError(
            f"routed_ffn: partition='clustered' needs calibration for {site.name}, and got none. "
            "Pass calibration=[batches] to sparsify(), or set partition='contiguous'."
        )
    # the router is small and decides by comparing logits: it stays in fp32 whatever the model's dtype
    routing = Routing(config, site, router.to(weight.device), None if order is None else order.to(weight.device))
    routing.train(owner.training)
    arguments = list(inspect.signature(block.forward).parameters)
    reclass(block, NotesPadding)
    # plain attributes: the routing is a child of the owner, and must not be one of the block too
    vars(block)["notes_padding_to"] = routing
    vars(block)["attention_mask_place"] = arguments.index("attention_mask") if "attention_mask" in arguments else None
    reclass(owner, Routed)
    owner.routed = routing
    undo_order = permute_units(owner, site, lambda m: m.routed.order) if order is not None else None

    def undo() -> None:
        if undo_order is not None:
            undo_order()
        del owner.routed
        declass(owner, Routed)
        del vars(block)["notes_padding_to"], vars(block)["attention_mask_place"]
        declass(block, NotesPadding)

    if config.dense_tokens == "targets":
        return see_targets(model, anatomy, site.name, routing, undo), routing
    return undo, routing


def prepare(
    model: nn.Module, planned: list[Edit], batches: list[dict[str, Tensor]], progress: Callable[[str, float], None]
) -> State:
    """Convert each FFN from calibration data: always-on units, clustering, router, compensation."""
    config: Any = planned[0].config
    if not config.needs_calibration or not batches:
        return {}
    return convert_sites(model, config, planned, batches, progress)


def after_adapter(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], steps: int, lr: float, progress: Progress
) -> None:
    """Layer-wise distillation (see `distillation`)."""
    distill(model, batches, steps=steps, lr=lr, progress=progress)


def merge_adapter_error(config: RoutedFFN, linears: list[str]) -> str | None:
    """With the published gate, LoRA does not go through the gate that its weight goes through."""
    if config.gated_by != "spt" or not linears:
        return None
    return (
        "with gate='spt' it bypasses the gate that the weight goes through, so merged outputs would differ. Use the "
        "adapter folder as it is, or train with gate='output' or 'ste'"
    )


register_method(
    RoutedFFN,
    Method(
        edits=edits,
        site_names=lambda anatomy: [site.name for site in anatomy.ffns if site.refused is None],
        prepare=prepare,
        modules_to_save=("router",),
        refuse=refuse_rows,
        after_adapter=after_adapter,
        merge_adapter_error=merge_adapter_error,
        limits=dict.fromkeys(
            QUANTISED, "its quantised linears would be read as plain weights. Load the model in bf16 or fp32"
        ),
    ),
)
