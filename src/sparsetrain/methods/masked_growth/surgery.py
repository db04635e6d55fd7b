"""How a plan becomes the models of a run, and how a ramp's masks meet the enlarged one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, Undo
from sparsetrain.core.cost import Cost
from sparsetrain.methods.masked_growth.config import AXES, GrowthRamp, MaskedGrowth, ramp_of
from sparsetrain.methods.masked_growth.masks import Place, places
from sparsetrain.methods.masked_growth.module import RampSite
from sparsetrain.methods.masked_growth.resize import check_sizes, layer_sources, origins, resized, sizes_of
from sparsetrain.surgery.method import Edit, Grown, Growth, Method, Stage, register_method
from sparsetrain.surgery.reclass import declass, reclass
from sparsetrain.surgery.site import Site


def stages(config: MaskedGrowth) -> tuple[Stage, ...]:
    """The first part of the plan, and two stages for each growth: its ramp, and what is left of its part."""
    (share, _), *growths = config.parts()
    found = [Stage(name="start", share=share)]
    rewinds = {"none": 0, "official": 2, "all": len(growths)}[config.rewind_in_force]
    for number, (share, changes) in enumerate(growths):
        name = " ".join(f"{change.axis}{change.how}{change.number}" for change in changes)
        rewind = number < rewinds
        found += [
            Stage(name=f"{name}, masked", share=config.ramp_ratio, rewind_lr=rewind),
            Stage(name=name, share=share - config.ramp_ratio),
        ]
    return tuple(found)


def enter(config: MaskedGrowth, stage: int, model: Any, anatomy: Anatomy, kept: Any) -> Grown:
    """Shrink the model at first; enlarge it for a ramp, with masks; go on with it after a ramp."""
    sizes = sizes_of(anatomy)
    if stage == 0:
        planned = config.sizes(sizes)
        for each in planned:
            check_sizes(model, anatomy, each)
        if planned[0] == sizes:
            return Grown(model=model)
        return Grown(model=resized(model, anatomy, planned[0], [*range(sizes["layers"])][: planned[0]["layers"]]))
    if stage % 2 == 0:
        return Grown(model=model)
    _, changes = config.parts()[(stage + 1) // 2]
    new_sizes = sizes | {change.axis: change.of(sizes[change.axis]) for change in changes}
    sources = layer_sources(sizes["layers"], new_sizes["layers"], config.depth_in_force)
    new = resized(model, anatomy, new_sizes, sources)
    for name, parameter in new.named_parameters():
        if not parameter.is_meta and not parameter.isfinite().all():
            raise ValueError(
                f"masked_growth: {name} of the enlarged model is not finite as it was made, and 0 times that is not 0. "
                "Correct the model's initialization (initializer_range)."
            )
    parts = stages(config)
    ramp = ramp_of(
        config,
        old=tuple(f"{axis}={sizes[axis]}" for axis in AXES),
        old_layers=tuple(sources.index(source) for source in range(sizes["layers"])),
        begin=sum(part.share for part in parts[:stage]),
        end=sum(part.share for part in parts[: stage + 1]),
    )
    return Grown(model=new, origins=origins(model, new, sources), edits=(ramp,))


def edits(config: GrowthRamp, anatomy: Anatomy, model: nn.Module) -> list[Edit]:
    """One edit, of the whole model."""
    found = list(places(config, anatomy, model))
    names = {place.name for place in found} | {ffn.name for ffn in anatomy.ffns}
    what = ", ".join(f"{axis} {size}" for axis, size in config.old_sizes.items() if size != sizes_of(anatomy)[axis])
    return [
        Edit(
            config=config,
            site="",
            layer=0,
            # a method that computes a masked module otherwise would leave its mask out
            claims=frozenset(names | {f"the gradient of {block.name}" for block in anatomy.blocks}),
            cost=lambda tokens: (Cost(), Cost()),
            install=partial(install, config=config, anatomy=anatomy, found=found),
            note=f"masks what is new (before: {what})",
        )
    ]


def install(
    model: nn.Module, tensors: dict[str, Tensor], config: GrowthRamp, anatomy: Anatomy, found: list[Place]
) -> tuple[Undo, Site]:
    """Give the model the masks, and each place that reads one its forward."""
    site = RampSite(config, old_channels(config, anatomy), new_entries(config, anatomy, model))
    done: list[tuple[Any, Place]] = []

    def undo() -> None:
        while done:
            module, place = done.pop()
            declass(module, place.mixin)
            del vars(module)[place.attribute]
        if "growth_ramp" in model._modules:
            del model.growth_ramp

    try:
        for place in found:
            module = model.get_submodule(place.name)
            value = place.value(site, module)
            reclass(module, place.mixin)
            vars(module)[place.attribute] = value  # not as a child: the site is the model's
            done.append((module, place))
        model.growth_ramp = site.train(model.training)
        if tensors:
            site.take(model, tensors)
    except BaseException:
        undo()
        raise
    return undo, site


def old_channels(config: GrowthRamp, anatomy: Anatomy) -> dict[str, Tensor]:
    """Axis -> which of its channels were there before the growth; the axes that grew alone."""
    old, new, attention = config.old_sizes, sizes_of(anatomy), anatomy.attentions[0]
    found = {axis: torch.arange(new[axis]) < old[axis] for axis in ("hidden", "ffn") if old[axis] < new[axis]}
    if old["heads"] < new["heads"]:
        old_kv = old["heads"] * attention.num_kv_heads // new["heads"]
        found["heads"] = torch.arange(new["heads"] * attention.head_dim) < old["heads"] * attention.head_dim
        found["kv_heads"] = torch.arange(attention.num_kv_heads * attention.head_dim) < old_kv * attention.head_dim
        found["fused"] = torch.cat([found["heads"], found["kv_heads"], found["kv_heads"]])
    return found


def new_entries(
    config: GrowthRamp, anatomy: Anatomy, model: Any
) -> list[tuple[nn.Parameter, torch.Size | None, tuple[int, int] | None]]:
    """The parameters that the growth has given new entries, with the shapes of their old corners (of each part)."""
    before = resized(model, anatomy, config.old_sizes, [*config.old_layers], "meta")
    sources = [0] * len(anatomy.blocks)
    for index, place in enumerate(config.old_layers):
        sources[place] = index
    shapes = {name: p.shape for name, p in before.named_parameters()}
    found: list[Any] = []
    new_blocks = tuple(b.name + "." for b in anatomy.blocks if b.layer not in config.old_layers)
    for name, origin in origins(before, model, sources).items():
        parameter, (source,) = model.get_parameter(name), origin.olds
        if name.startswith(new_blocks):
            found.append((parameter, None, None))
        elif (shape := shapes[source]) != parameter.shape:
            if origin.parts is not None:
                dim = origin.parts[0] % len(shape)
                shape = torch.Size([*shape[:dim], origin.parts[1], shape[dim] // origin.parts[1], *shape[dim + 1 :]])
            found.append((parameter, shape, origin.parts))
    return found


def with_small_share(config: MaskedGrowth, share: float) -> MaskedGrowth:
    """All parts but the last together, in their proportions; each growth has at least twice its ramp."""
    *smaller, (last, _) = config.parts()
    least = 2 * config.ramp_ratio
    share, before = min(share, 1 - max(least, 0.1)), 1 - last
    shares = [max(part * share / before, least if number else 0.01) for number, (part, _) in enumerate(smaller)]
    shares = [round(100 * part, 2) for part in shares]
    lines = [line.split("%", 1)[-1].strip() for line in config.plan]
    given = [f"{part:g}% {line}" for part, line in zip(shares, lines)]
    return replace(config, plan=(*given, f"{round(100 - sum(shares), 2):g}% {lines[-1]}"))


register_method(MaskedGrowth, Method(growth=Growth(stages=stages, enter=enter, with_small_share=with_small_share)))
register_method(GrowthRamp, Method(edits=edits, site_names=lambda anatomy: [anatomy.model_class]))
