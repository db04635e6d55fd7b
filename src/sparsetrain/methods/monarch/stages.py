"""S2D: a run that trains Monarch linears first, and then the dense weights that they multiply out to."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, submodule
from sparsetrain.methods.monarch.config import MonarchThenDense
from sparsetrain.methods.monarch.module import MonarchSite, joined
from sparsetrain.methods.monarch.replace import candidates, install
from sparsetrain.ops.monarch_linear import dense_of
from sparsetrain.surgery.method import Grown, Growth, Origin, Stage, Weights


def stages(config: MonarchThenDense) -> tuple[Stage, ...]:
    return (
        Stage(name="monarch", share=1 - config.dense_share),
        Stage(name="dense", share=config.dense_share, restart_lr=config.restart_lr),
    )


def enter(
    config: MonarchThenDense, stage: int, model: nn.Module, anatomy: Anatomy, _kept: MutableMapping[str, Weights]
) -> Grown:
    """Stage 0: the recipe's own model with factors in it. Stage 1: a dense one of what they multiply out to."""
    return _with_factors(config, model, anatomy) if stage == 0 else _multiplied_out(model)


def _with_factors(config: MonarchThenDense, model: nn.Module, anatomy: Anatomy) -> Grown:
    depth = max(1, len(anatomy.blocks))
    taken = [site for site in candidates(anatomy, config.roles) if config.takes(site.name, site.layer, depth)]
    if not taken:
        raise ValueError(
            f"{config.method} matches no linear of {anatomy.model_class} with targets={config.targets}, "
            f"layers={config.layers}, roles={config.roles}. Widen them."
        )
    for site in taken:
        install(model, {}, config, site)
    return Grown(model=model)


def _multiplied_out(model: nn.Module) -> Grown:
    new = copy.deepcopy(model)
    origins = {name: Origin(name) for name, _ in model.named_parameters()}
    for name, site in model.named_modules():
        if isinstance(site, MonarchSite):
            owner, _, child = name.rpartition(".")
            setattr(submodule(new, owner), child, submodule(new, name).plain())  # type: ignore[operator]
            factors = [f"{name}.{factor}" for factor, _ in site.named_parameters() if factor != "bias"]
            origins[f"{name}.weight"] = Origin(tuple(factors), map=partial(_weight, site), carry=False)
    known = {name for name, _ in new.named_parameters()}
    return Grown(model=new, origins={name: origin for name, origin in origins.items() if name in known})


def _weight(site: MonarchSite, *factors: Tensor) -> Tensor:
    """The dense weight of the factors of a site, in the order of its parameters."""
    left: Any = iter(factors)
    pieces = []
    for part in site.parts:
        right = next(left)
        shape = part.shape
        whole = dense_of(right, next(left) if shape.rank else None)  # type: ignore[union-attr]
        pieces.append(whole[: shape.out_features, : shape.in_features])  # type: ignore[union-attr]
    return joined(pieces, site.transposed)


GROWTH = Growth(stages=stages, enter=enter)
