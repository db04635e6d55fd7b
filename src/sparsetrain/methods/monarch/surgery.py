"""Monarch on a model: its edits, what they cost, and leaving."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, LinearSite, submodule
from sparsetrain.core.cost import Cost
from sparsetrain.methods.monarch.config import Monarch, MonarchThenDense
from sparsetrain.methods.monarch.replace import candidates, check, install, shapes_of
from sparsetrain.methods.monarch.stages import GROWTH
from sparsetrain.surgery.apply import Handle
from sparsetrain.surgery.edits import edits_at
from sparsetrain.surgery.method import QUANTISED, Edit, Method, register_method

_LORA = "PEFT wraps none of its linears, so that its factors would stay as they are. Train all weights (lora_r=0)"
_QUANTISED = "it takes the weight apart, and a quantised one is packed. Load the model in bf16 or fp32"


def edits(config: Monarch, anatomy: Anatomy, model: nn.Module) -> list[Edit]:
    """One edit a linear."""
    return edits_at(
        config,
        anatomy,
        candidates(anatomy, config.roles),
        install,
        cost=lambda site, _tokens: costs(config, site),
        check=lambda site: check(config, site),
        replaces=lambda site: (f"{site.name}.weight",) if config.replaces else (),
        blank=lambda site: _blank(config, site, submodule(model, site.name)),
        note=lambda site: ", ".join(dict.fromkeys(map(str, shapes_of(config, site)))) if config.replaces else "dense",
    )


def costs(config: Monarch, site: LinearSite) -> tuple[Cost, Cost]:
    """(dense, Monarch) per token, biases left out of both."""
    size = site.in_features * site.out_features
    dense = Cost(num_params=size, flops=2.0 * size, saved_elements=site.in_features)
    if not config.replaces:
        return dense, dense
    shapes = shapes_of(config, site)
    params = sum(shape.num_params for shape in shapes)
    kept = shapes[0].padded[0] + sum(shape.middle for shape in shapes)
    return dense, Cost(num_params=params, flops=2.0 * params, saved_elements=kept)


def _blank(config: Monarch, site: LinearSite, dense: Any) -> dict[str, Tensor]:
    """Factors of the right shapes, where a projection would take a minute and nobody reads its result."""
    if not config.replaces:
        return {}
    found = {"lost": torch.zeros(len(site.parts) or 1)} if config.init == "project" else {}
    for index, shape in enumerate(shapes_of(config, site)):
        for name, size in (("right", shape.right), ("left", shape.left)):
            if size is not None:
                found[f"parts.{index}.{name}"] = torch.zeros(size, dtype=dense.weight.dtype, device=dense.weight.device)
    return found


def multiplied(handle: Handle) -> nn.Module:
    """The dense model: every weight is what its factors multiply out to. Outputs are the same up to rounding.

    Raises:
        ValueError: another method's site cannot be merged. Nothing has changed then.
    """
    sites = handle.sites(Monarch.method)
    for edit, module in handle.installed:
        if edit.method != Monarch.method and (reason := module.merge_error()):
            raise ValueError(
                f"{edit.key} cannot be merged into a plain model: {reason}. Its own method must end first."
            )
    weights = {name: site.dense_weights() for name, site in sites.items()}
    handle.restore()
    with torch.no_grad():
        for name, found in weights.items():
            for parameter, value in found.items():
                getattr(submodule(handle.model, name), parameter).copy_(value)
    return handle.model


_STAGES = (
    "its stages have models of several sizes, and sharded ones are not carried over. Train with DDP, or on one device"
)
register_method(
    Monarch,
    Method(
        edits=edits,
        site_names=lambda anatomy: [site.name for site in candidates(anatomy)],
        exports={"multiplied": multiplied},
        limits={**dict.fromkeys(QUANTISED, _QUANTISED), "lora": _LORA},
    ),
)
register_method(
    MonarchThenDense,
    Method(growth=GROWTH, limits={**dict.fromkeys(QUANTISED, _QUANTISED), "lora": _LORA, "fsdp2": _STAGES}),
)
