"""Which modules of an enlarged model read which mask.

Hidden: embeddings (or their norm), what each block's branches give, every norm over the channels, and the input of a
linear that reads another linear after the blocks (a pooler's). FFN and heads: what goes into their last linear, after
the activation and the attention. Layers: a gate on the block. As published (`faithful`): what goes out of the first
linears, before the activation and the attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsetrain.core.anatomy import Anatomy, LinearSite
from sparsetrain.methods.masked_growth.config import GrowthRamp
from sparsetrain.methods.masked_growth.module import (
    GatedBlock,
    MaskedLinear,
    MaskedNorm,
    MaskedStream,
    RampSite,
    added_to_gain,
)
from sparsetrain.methods.masked_growth.resize import resized, sizes_of


@dataclass(frozen=True, kw_only=True)
class Place:
    """A module that reads a mask.

    mixin: its forward. attribute: what that reads; value: (site, module) -> of the attribute.
    """

    name: str
    mixin: type
    value: Callable[[RampSite, Any], Any]
    attribute: str = "growth"


def places(config: GrowthRamp, anatomy: Anatomy, model: Any) -> Iterator[Place]:
    """Every place of an enlarged model where something is masked."""
    old, new = config.old_sizes, sizes_of(anatomy)
    grown = {axis for axis in new if old[axis] < new[axis]}
    for block in anatomy.blocks:
        for linear in block.linears:
            reads, writes = _masks_of(linear, grown, config.faithful)
            if reads or writes:
                yield _linear(linear.name, reads, writes)
        if block.layer not in config.old_layers:
            yield Place(name=block.name, mixin=GatedBlock, value=lambda site, _: site)
    if "hidden" in grown:
        yield from _hidden(config, anatomy, model)


def _masks_of(linear: LinearSite, grown: set[str], faithful: bool) -> tuple[str | None, str | None]:
    """(axis of the mask on a linear's inputs, on its outputs)."""
    last = {"o": "heads", "down": "ffn"}.get(linear.role)
    first = {"up": "ffn", "gate": "ffn", "q": "heads", "k": "kv_heads", "v": "kv_heads", "qkv": "fused"}
    writes = first.get(linear.role) if faithful else None
    if writes is not None and ("ffn" if writes == "ffn" else "heads") not in grown:
        writes = None
    if last is not None and "hidden" in grown:
        writes = "hidden"
    return last if last in grown and not faithful else None, writes


def _hidden(config: GrowthRamp, anatomy: Anatomy, model: Any) -> Iterator[Place]:
    """What masks the stream of hidden channels, beside what the blocks' branches give."""
    before = dict(resized(model, anatomy, config.old_sizes, [*range(len(anatomy.blocks))], "meta").named_modules())
    blocks = tuple(f"{block.name}." for block in anatomy.blocks)
    streamed = read_linear = False
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.shape == before[name].weight.shape or isinstance(module, nn.Embedding):
            continue
        outside = not name.startswith(blocks)
        if weight.ndim == 1:
            yield _norm(name, anatomy.norm_offset)
            read_linear &= not outside
            streamed |= outside and "embed" in name
        elif outside and isinstance(module, nn.Linear):
            if read_linear:  # it reads another linear, which no norm has masked
                yield _linear(name, "hidden", None)
            read_linear = weight.shape[0] != before[name].weight.shape[0]
    if not streamed:
        yield Place(name=anatomy.blocks[0].name, mixin=MaskedStream, attribute="stream", value=lambda site, _: site)


def _linear(name: str, reads: str | None, writes: str | None) -> Place:
    return Place(name=name, mixin=MaskedLinear, value=lambda site, _: (site, reads, writes))


def _norm(name: str, offset: float) -> Place:
    def value(site: RampSite, module: Any) -> tuple[RampSite, float]:
        if isinstance(module, nn.LayerNorm):
            return site, 0.0
        return site, offset if module.weight.is_meta else added_to_gain(module, name)

    return Place(name=name, mixin=MaskedNorm, value=value)
