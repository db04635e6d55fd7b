"""The V-cycle as stages of a run: down the levels, each a little trained, and up again."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace

from torch import nn

from sparsetrain.core.anatomy import Anatomy
from sparsetrain.methods.multi_level.config import MultiLevel
from sparsetrain.methods.multi_level.module import coalesce, decoalesce, interpolate, mapped_anatomy
from sparsetrain.surgery.method import Grown, Growth, Method, Stage, Weights, register_method


def levels_of(config: MultiLevel) -> list[int]:
    """The level that each stage trains, 1 the largest: 1, 2, …, K, …, 2, 1, or K, …, 1 where nothing trains first."""
    down = range(1, config.levels) if config.start_share else range(0)
    return [*down, *range(config.levels, 0, -1)]


def stages(config: MultiLevel) -> tuple[Stage, ...]:
    levels, starts = levels_of(config), config.levels - 1 if config.start_share else 0
    small = config.small_share / (config.levels - 1)
    found = []
    for i, level in enumerate(levels):
        if i < starts:
            found.append(Stage(name=f"level {level}, start", share=config.start_share))
            continue
        after = {"restart_lr": True, "warmup_steps": config.warmup_steps if i else None}
        if level == 1:
            found.append(Stage(name="level 1", share=config.final_share, **after))
        else:
            found.append(Stage(name=f"level {level}", share=small, lr_ratio=config.small_lr, **after))
    return tuple(found)


def enter(
    config: MultiLevel, stage: int, model: nn.Module, anatomy: Anatomy, kept: MutableMapping[str, Weights]
) -> Grown:
    """Coalesce, or de-coalesce and mix with the model as it was when it was coalesced, which `kept` has."""
    levels = levels_of(config)
    level, before = levels[stage], levels[stage - 1] if stage else 1
    if stage == 0:
        mapped_anatomy(model, config)
    if level == before:
        return Grown(model=model)
    if level > before:
        kept[f"level-{before}"] = {name: p.detach().clone() for name, p in model.named_parameters()}
        return coalesce(model, config)
    if f"level-{level}" not in kept:
        raise ValueError(
            f"{config.method}: stage {stage} mixes level {level} with what it was before it was merged, and `kept` has "
            "no weights of it. Give the same `kept` to each call."
        )
    return interpolate(decoalesce(model, config), kept[f"level-{level}"], config.alpha)


def with_small_share(config: MultiLevel, share: float) -> MultiLevel:
    """Starts stay as they are, and the largest model has at least a tenth of the steps at the end."""
    most = 0.9 - (config.levels - 1) * config.start_share
    return replace(config, small_share=round(min(share, most), 4))


register_method(MultiLevel, Method(growth=Growth(stages=stages, enter=enter, with_small_share=with_small_share)))
