"""Conversion inside a model: read each FFN's inputs from calibration batches, and convert it on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import FFNSite, describe, submodule
from sparsetrain.methods.routed_ffn.config import RoutedFFN
from sparsetrain.surgery.lora import linear_parts
from sparsetrain.surgery.plan import Edit, State

SITES_AT_ONCE_BYTES = 2**30
"""Inputs of as many FFNs are kept at once as fit in this; the rest is read in further passes over the batches."""


def convert_sites(
    model: nn.Module,
    config: RoutedFFN,
    planned: list[Edit],
    batches: list[dict[str, Tensor]],
    progress: Callable[[str, float], None],
) -> State:
    """`edit.key` -> order, router and compensation of each planned FFN.

    Args:
        batches: keyword arguments of the model's forward; padding tokens are left out.
    """
    sites = {block.ffn.name: block.ffn for block in describe(model).blocks if block.ffn is not None}
    tokens = sum(int(next(iter(batch.values())).shape[:2].numel()) for batch in batches)
    at_once = max(1, SITES_AT_ONCE_BYTES // (4 * tokens * sites[planned[0].site].hidden_size))
    state: State = {}
    for start in range(0, len(planned), at_once):
        part = planned[start : start + at_once]
        inputs = read_inputs(model, [sites[edit.site] for edit in part], batches)
        for i, edit in enumerate(part):
            progress("routed_ffn: converting FFNs", (start + i) / len(planned))
            state[edit.key] = _convert(submodule(model, edit.site), config, sites[edit.site], inputs.pop(edit.site))
    return state


def read_inputs(model: nn.Module, sites: list[FFNSite], batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What enters each FFN, [n, d] fp32, over all real tokens of the batches."""
    found: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    mask: list[Tensor | None] = [None]

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            real = mask[0]
            found[name].append(x[real.reshape(-1)] if real is not None and real.numel() == len(x) else x)

        return hook

    hooks = [
        submodule(model, f"{site.name}.{site.up}").register_forward_pre_hook(keep(site.name)) for site in sites
    ]
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                real = batch.get("attention_mask")
                mask[0] = None if real is None or real.ndim != 2 else real.bool()
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return {name: torch.cat(parts) for name, parts in found.items()}


@torch.no_grad()
def _convert(owner: nn.Module, config: RoutedFFN, site: FFNSite, x_nd: Tensor) -> dict[str, Tensor]:
    up = linear_parts(owner.get_submodule(site.up), site.transposed)
    down = linear_parts(owner.get_submodule(site.down), site.transposed)
    gate = linear_parts(owner.get_submodule(site.gate), site.transposed) if site.gate else None
    from sparsetrain.methods.routed_ffn.convert import convert_ffn

    raise NotImplementedError((up, down, gate, config, convert_ffn))
