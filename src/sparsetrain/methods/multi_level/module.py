"""The three maps between levels: coalesce, de-coalesce, interpolate; each makes a new model and leaves the old one.

A weight is mapped along each of its dimensions by what the dimension counts (arXiv 2404.07999, section 3): outputs are
averaged and copied, inputs summed and split, so that a unit's copies together say to the next layer what it said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, describe
from sparsetrain.methods.multi_level.config import MultiLevel
from sparsetrain.ops.unit_groups import Groups, How, map_units, read_groups, units_above
from sparsetrain.surgery.method import Grown, Origin, Weights

EMBEDDINGS = ("vocab", "positions", "types")
"""Axes of what is looked up: their features are outputs."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """How a model of these sizes and the one below it hang together.

    sizes: of the larger. head_dim: features of a head. width: groups of key/value heads. depth: groups of layers.
    """

    sizes: Mapping[str, int]
    head_dim: int
    width: Groups
    depth: Groups

    @property
    def smaller(self) -> dict[str, int]:
        kept, of = len(self.width), sum(map(len, self.width))
        return {name: size * kept // of for name, size in self.sizes.items() if name != "layers"}

    def units(self, axis: str) -> tuple[Groups, int] | None:
        """(groups, features of a unit) of an axis whose size changes."""
        heads = sum(map(len, self.width))
        if axis not in self.smaller or len(self.width) == heads:
            return None
        return self.width, self.sizes[axis] // heads * (self.head_dim if "heads" in axis else 1)


def level_of(config: MultiLevel, anatomy: Anatomy, sizes: Mapping[str, int]) -> Level:
    """The maps below a model of these sizes.

    Raises:
        ValueError: heads or layers that the groups do not cover; sizes that do not divide into as many units.
    """
    name = f"{config.method}: {anatomy.model_class}"
    heads = sizes["kv_heads"]
    what = f"{name}, {'heads' if heads == sizes['heads'] else 'key/value heads'} (width)"
    width = read_groups(config.width_scheme, heads, config.width, what)
    depth = read_groups(config.depth_scheme, sizes["layers"], config.depth, f"{name}, layers (depth)")
    for groups, key in ((width, "width_scheme"), (depth, "depth_scheme")):
        if len({len(group) for group in groups}) > 1 and not config.allow_uneven:
            raise ValueError(
                f"{name}: {key}={getattr(config, key)!r} has groups of different sizes. Make them equal, or set "
                "allow_uneven=true."
            )
    if len(width) < heads:
        for axis in ("embed", "ffn"):
            if sizes[axis] % heads:
                raise ValueError(
                    f"{name}: {axis}={sizes[axis]} does not divide into {heads} units, one a head. Change the size, or "
                    "take width=1."
                )
    return Level(sizes=sizes, head_dim=anatomy.attentions[0].head_dim, width=width, depth=depth)


def larger_sizes(config: MultiLevel, anatomy: Anatomy) -> dict[str, int]:
    """The sizes of the level above."""
    sizes = anatomy.sizes
    heads, layers = sizes["kv_heads"], sizes["layers"]
    above = units_above(config.width_scheme, heads, config.width)
    found = {axis: size * above // heads for axis, size in sizes.items()}
    return found | {"layers": units_above(config.depth_scheme, layers, config.depth)}


def coalesce(model: nn.Module, config: MultiLevel) -> Grown:
    """The model below: F W A in width, the mean over each group of layers in depth."""
    anatomy = mapped_anatomy(model, config)
    level = level_of(config, anatomy, anatomy.sizes)
    assert anatomy.resized is not None
    new = anatomy.resized(model, level.smaller, [group[0] for group in level.depth])
    return _grown(config, level, new, old=anatomy, down=True)


def decoalesce(model: nn.Module, config: MultiLevel) -> Grown:
    """The model above: A W rownorm(Aᵀ) in width, a copy for every layer of a group in depth."""
    anatomy = mapped_anatomy(model, config)
    level = level_of(config, anatomy, larger_sizes(config, anatomy))
    layer_of = {layer: i for i, group in enumerate(level.depth) for layer in group}
    sizes = {name: size for name, size in level.sizes.items() if name != "layers"}
    assert anatomy.resized is not None
    new = anatomy.resized(model, sizes, [layer_of[layer] for layer in range(len(layer_of))])
    return _grown(config, level, new, old=anatomy, down=False)


def interpolate(grown: Grown, saved: Weights, alpha: float) -> Grown:
    """(1 - alpha) · saved + alpha · what `grown` makes of its model, in every parameter.

    Raises:
        ValueError: alpha outside [0, 1]; `saved` has other names or shapes.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"interpolate: alpha={alpha} is out of range. It must lie in [0, 1].")
    new = {name: tuple(parameter.shape) for name, parameter in grown.model.named_parameters()}
    found = {name: tuple(weight.shape) for name, weight in saved.items()}
    if new != found:
        name = min(name for name in new.keys() | found.keys() if new.get(name) != found.get(name))
        raise ValueError(
            f"interpolate: {name} is {found.get(name, 'not there')} in the saved model and "
            f"{new.get(name, 'not there')} in the expanded one. Both must be the same model."
        )

    def mixed(name: str, origin: Origin, *olds: Tensor) -> Tensor:
        assert origin.map is not None
        expanded = origin.map(*olds)
        return torch.lerp(saved[name].to(expanded), expanded, alpha)

    origins = {
        name: Origin(origin.old, map=partial(mixed, name, origin), carry=False)
        for name, origin in grown.origins.items()
    }
    return Grown(model=grown.model, origins=origins, optimizer="fresh")


def mapped_anatomy(model: nn.Module, config: MultiLevel) -> Anatomy:
    """The anatomy of a model that can be mapped.

    Raises:
        ValueError: a parameter whose axes nobody knows; a tied head without a norm before it; a fused projection of
            grouped keys and values.
    """
    anatomy = describe(model)
    unknown = [name for name, _ in model.named_parameters() if name not in anatomy.axes]
    if anatomy.resized is None or unknown:
        what = f"the axes of {', '.join(unknown[:3])} are not known" if unknown else "its adapter makes no other sizes"
        raise ValueError(
            f"{config.method}: {anatomy.model_class} cannot be mapped: {what}. Add them to its adapter "
            "(sparsetrain/core/axes.py), or train another model."
        )
    uneven = [linear.name for linear in anatomy.linears if len({size for _, size in linear.parts}) > 1]
    if uneven and config.width > 1:
        raise ValueError(
            f"{config.method}: {uneven[0]} holds queries, keys and values of different widths in one weight, which is "
            "not mapped in width. Take width=1, or a model that has them apart."
        )
    if tied(model, anatomy) and anatomy.last_norm is None and config.scaling == "norm" and config.width > 1:
        raise ValueError(
            f"{config.method}: the head of {anatomy.model_class} is its embedding, and no norm stands before it to "
            "take up the factor. Untie them, or take width=1 or scaling='official'."
        )
    return anatomy


def tied(model: Any, anatomy: Anatomy) -> bool:
    """Is the head's weight the embedding's?"""
    if anatomy.head is None or anatomy.embedding is None:
        return False
    return model.get_submodule(anatomy.head).weight is model.get_submodule(anatomy.embedding).weight


@dataclass(frozen=True, kw_only=True)
class _Map:
    """Makes one parameter of the new model. anatomy: of the model that has the parameter's old form."""

    level: Level
    name: str
    anatomy: Anatomy
    down: bool
    factor: Tensor | None = None

    def __call__(self, *layers: Tensor) -> Tensor:
        new = self._in_width(layers[0])
        for layer in layers[1:]:
            new = new + self._in_width(layer)
        new = new / len(layers) if len(layers) > 1 else new
        if self.factor is None:
            return new
        offset = self.anatomy.norm_offset if self.name == f"{self.anatomy.last_norm}.weight" else 0.0
        return (new + offset) * self.factor.to(new) - offset

    def _in_width(self, w: Tensor) -> Tensor:
        for dim, axis in enumerate(self.anatomy.axes[self.name]):
            units = self.level.units(axis)
            if units is not None:
                reads = self.anatomy.reads.get(self.name) == dim
                how: How = ("sum" if reads else "mean") if self.down else ("split" if reads else "copy")
                w = map_units(w, units[0], how, dim=dim, unit=units[1])
        return w


def _grown(config: MultiLevel, level: Level, new: nn.Module, *, old: Anatomy, down: bool) -> Grown:
    """The new model, and how its parameters come from the old one's."""
    blocks, anatomy = [block.name for block in old.blocks], describe(new)
    above = {layer: (i,) for i, group in enumerate(level.depth) for layer in group}
    origins = {}
    for name, _ in new.named_parameters():
        sources: tuple[str, ...] = (name,)
        for layer, block in enumerate(anatomy.blocks):
            if name.startswith(f"{block.name}."):
                of_layer = level.depth[layer] if down else above[layer]
                sources = tuple(blocks[i] + name.removeprefix(block.name) for i in of_layer)
        factor = _factor(config, level, sources[0], new, old, anatomy, down)
        mapping = _Map(level=level, name=sources[0], anatomy=old, down=down, factor=factor)
        origins[name] = Origin(sources, map=mapping, carry=False)
    return Grown(model=new, origins=origins, optimizer="fresh")


def _factor(
    config: MultiLevel, level: Level, name: str, new: nn.Module, old: Anatomy, anatomy: Anatomy, down: bool
) -> Tensor | None:
    """What a mapped parameter is multiplied by, where it is: a number, or of a norm one a feature."""
    axes = old.axes[name]
    if config.scaling == "official":
        scaled = axes[0] in EMBEDDINGS and "embed" in axes and name not in old.reads
        return torch.tensor(2.0 if down else 0.5) if scaled else None
    scale = old.embedding_scale / anatomy.embedding_scale
    if name == f"{old.embedding}.weight":
        return torch.tensor(scale, dtype=torch.float64) if scale != 1 else None
    units = level.units("embed")
    if units is None or name.rpartition(".")[0] != old.last_norm or not tied(new, anatomy):
        return None
    # the head sums over a group's copies: |g| times what one of them says
    counts = torch.tensor([float(len(group)) for group in level.width], dtype=torch.float64)
    of_feature = ((counts if down else 1 / counts) / scale).repeat_interleave(units[1])
    return of_feature if down else map_units(of_feature, units[0], "copy", unit=units[1])
