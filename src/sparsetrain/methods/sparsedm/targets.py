"""Which layers are masked, and why the others stay dense."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn
from torch.nn.modules.conv import _ConvNd

from sparsetrain.core.anatomy import Anatomy, ConvolutionSite, LinearSite, innermost
from sparsetrain.methods.sparsedm.config import SparseDM

Layer = LinearSite | ConvolutionSite


def target_layers(anatomy: Anatomy) -> list[Layer]:
    """Attention's and the FFN's linears of every block, and every convolution but the first and the last one outside of
    the blocks, which read and write the picture (`patch`, `conv_in`, `conv_out`); samplers lie between them."""
    outside = [site.name for site in anatomy.convolutions if site.layer is None]
    ends = {*outside[:1], *outside[-1:]}
    linears = [site for site in anatomy.linears if site.role != "other"]
    return [*linears, *(site for site in anatomy.convolutions if site.name not in ends)]


def inputs_of(site: Layer) -> int:
    """Inputs that groups run along: of a convolution, the channels of one of its groups."""
    return site.in_features if isinstance(site, LinearSite) else site.in_channels // site.groups


def misfit(config: SparseDM, site: Layer) -> str | None:
    """Why a layer cannot be masked at one of the config's ratios, or None."""
    sizes = {config.ratio.group, *(ratio.group for _, ratio in config.stages)}
    odd = sorted(size for size in sizes if inputs_of(site) % size)
    return f"{inputs_of(site)} inputs do not divide by {odd[0]}" if odd else None


def dense_layers(config: SparseDM, anatomy: Anatomy, model: nn.Module) -> dict[str, str]:
    """Name of every linear and convolution of the model that is not masked -> why."""
    depth = max(1, len(anatomy.blocks))
    targets = {site.name: site for site in target_layers(anatomy)}
    in_blocks = {site.name for site in anatomy.linears}
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(innermost(module), nn.Linear | _ConvNd) or ".base_layer" in name or ".lora_" in name:
            continue
        if (site := targets.get(name)) is not None:
            if not config.takes(name, site.layer or 0, depth):
                found[name] = "left out by targets, layers or from_depth"
            elif reason := misfit(config, site):
                found[name] = reason
        elif isinstance(innermost(module), _ConvNd):
            found[name] = "reads or writes the picture"
        else:
            found[name] = "time or modulation" if name in in_blocks else "outside of the blocks"
    return found


def told(dense: dict[str, str]) -> str:
    """The dense layers in a line: by reason, layers that differ in their numbers alone as one."""
    by_reason: dict[str, dict[str, int]] = {}
    for name, reason in dense.items():
        short = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        names = by_reason.setdefault(reason, {})
        names[short] = names.get(short, 0) + 1
    return "; ".join(f"{', '.join(_counted(names))} ({reason})" for reason, names in by_reason.items())


def _counted(names: dict[str, int]) -> Iterable[str]:
    return (name if count == 1 else f"{count} x {name}" for name, count in names.items())
