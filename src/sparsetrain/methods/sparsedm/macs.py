"""Multiply-adds of a masked model: of its masked layers, and of the whole model, before and after."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparsetrain.core.anatomy import innermost, submodule
from sparsetrain.core.modes import evaluating


@dataclass(frozen=True, kw_only=True)
class Macs:
    """Multiply-adds of one forward.

    layers: name of each masked layer -> (dense, masked): N/M of the dense ones.
    model: of the whole dense model; attention's products are in it, norms and activations are none.
    """

    layers: dict[str, tuple[float, float]]
    model: float

    @property
    def targets(self) -> tuple[float, float]:
        """(dense, masked) of all masked layers."""
        return sum(dense for dense, _ in self.layers.values()), sum(masked for _, masked in self.layers.values())

    @property
    def whole(self) -> tuple[float, float]:
        """(dense, masked) of the whole model."""
        dense, masked = self.targets
        return self.model, self.model - dense + masked

    def __str__(self) -> str:
        return (
            f"multiply-adds of {len(self.layers)} masked layers: {_change(*self.targets)}; of the whole model: "
            f"{_change(*self.whole)}"
        )


def count_macs(handle: Any, model: nn.Module, batch: dict[str, Tensor]) -> Macs:
    """Multiply-adds of `model(**batch)` at the ratios in force, zeros left out as if the hardware skipped them.

    Args:
        handle: of the conversion. model: the converted model, or the one around it.
    """
    sites = handle.sites("sparsedm")
    layers: dict[str, tuple[float, float]] = {}
    hooks = []
    for name, site in sites.items():
        hooks.append(innermost(submodule(handle.model, name)).register_forward_hook(_counting(layers, name, site)))
    counted = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    counter = FlopCounterMode(display=False, custom_mapping=counted)  # type: ignore[arg-type]
    try:
        with evaluating(model), handle.dense(), torch.no_grad(), counter:
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return Macs(layers=layers, model=counter.get_total_flops() / 2)


def _counting(layers: dict[str, tuple[float, float]], name: str, site: Any) -> Any:
    def count(layer: Any, _inputs: Any, y: Tensor) -> None:
        per_position = site.weight.numel()
        positions = y.numel() // (layer.out_channels if hasattr(layer, "out_channels") else y.shape[-1])
        dense = float(per_position * positions)
        before, after = layers.get(name, (0.0, 0.0))  # a layer may be called twice
        layers[name] = (before + dense, after + dense * site.keep / site.group)

    return count


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """FLOPs of q kᵀ and of the product with v, every pair counted."""
    return 2 * math.prod(q) * k[-2] + 2 * math.prod(q[:-1]) * k[-2] * v[-1]


def _change(before: float, after: float) -> str:
    return f"{before:,.4g} -> {after:,.4g} ({(after - before) / before if before else 0:+.1%})"
