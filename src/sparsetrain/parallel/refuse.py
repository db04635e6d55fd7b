"""What a grid cannot cut of a model, said before anything is edited or sent."""

from __future__ import annotations

from torch import nn

from sparsetrain.core.anatomy import Anatomy, LinearSite, innermost, submodule
from sparsetrain.parallel.shape import TRANSPOSED_ROLES, GridShape, linear_error
from sparsetrain.surgery.site import Site


def whole_linears(model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
    """Linears that stay whole on every rank -> why: what a method has replaced, or holds inside a module of its own."""
    # what edits an FFN leaves its site beside the FFN's linears, and reads their weights; one of an attention does not
    edited = {
        name: type(child).__name__
        for ffn in anatomy.ffns
        for child in submodule(model, ffn.name).children()
        if isinstance(child, Site)
        for name in (f"{ffn.name}.{ffn.up}", f"{ffn.name}.{ffn.gate}", f"{ffn.name}.{ffn.down}")
    }
    inside = [name for name, module in model.named_modules() if isinstance(module, Site)]
    found = {}
    for site in anatomy.linears:
        linear = innermost(submodule(model, site.name))
        owner = next((name for name in inside if site.name == name or site.name.startswith(f"{name}.")), None)
        if site.name in edited or owner is not None:
            kind = edited.get(site.name) or type(submodule(model, owner or "")).__name__
            found[site.name] = f"{kind} reads its weight"
        elif type(linear) is not nn.Linear and type(linear).__name__ != "Conv1D":
            found[site.name] = f"{type(linear).__name__} is no plain linear"
    return found


def check_plain(shape: GridShape, anatomy: Anatomy, sites: list[LinearSite]) -> None:
    """Raise ValueError if the grid cuts none of the linears, or cannot cut one."""
    if not sites:
        raise ValueError(
            f"grid {shape}: {anatomy.model_class} has no linear left to cut. Every one belongs to a sparse method, or "
            "is cut already. Use data-parallel training for it."
        )
    for site in sites:
        transposed = site.role in TRANSPOSED_ROLES
        if why := linear_error(shape, site.in_features, site.out_features, transposed):
            raise ValueError(
                f"grid {shape} cannot cut {site.name} ({site.in_features} -> {site.out_features}): {why}. "
                "Use another grid; `sparsetrain plan --gpus` lists those that fit."
            )


def check_expert(shape: GridShape, model: nn.Module, anatomy: Anatomy, left: dict[str, str]) -> None:
    """Raise ValueError if some part of a block cannot work on cut features."""
    advice = "Use mode plain, which cuts the linears alone."
    if left:
        name, why = next(iter(left.items()))
        raise ValueError(f"expert mode cuts every linear of a block, and {name} stays whole: {why}. {advice}")
    for site in anatomy.attentions:
        for count, what in ((site.num_heads, "heads"), (site.num_kv_heads, "key/value heads")):
            if count % shape.y:
                raise ValueError(f"grid {shape}: the {count} {what} of {site.name} do not divide by y={shape.y}.")
    for block in anatomy.blocks:
        if block.attention is None or block.ffn is None:
            raise ValueError(f"expert mode needs an attention and an FFN in {block.name}. {advice}")
        known = {site.name for site in block.linears} | set(block.norms)
        for name, parameter in submodule(model, block.name).named_parameters(block.name):
            owner = name.rpartition(".")[0]
            if owner not in known:
                raise ValueError(
                    f"expert mode does not know how to cut {name} {tuple(parameter.shape)} of {anatomy.model_class}. "
                    f"{advice}"
                )
