"""Conversion inside a model: read each FFN's inputs from calibration batches, and convert it on them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import FFNSite, describe, submodule
from sparsetrain.methods.routed_ffn.config import RoutedFFN
from sparsetrain.methods.routed_ffn.convert import FFNWeights, convert_ffn
from sparsetrain.surgery.calibration import blocks_only
from sparsetrain.surgery.lora import linear_parts
from sparsetrain.surgery.method import Edit, State

FIT_TOKENS = 8192
"""An FFN is fitted on about as many tokens, evenly spaced over all that the batches hold: neighbours tell little more.
SmolLM2-135M, 23 FFNs, 8,192 of 16,384 tokens: 1.184 times the dense perplexity, as with all. The rows are read to their
ends: fitted on their first halves, which takes half the reading, it was 1.196 instead of 1.187, on quarters 1.228."""
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
    tokens = min(_num_tokens(batches), 2 * FIT_TOKENS)
    at_once = max(1, SITES_AT_ONCE_BYTES // (4 * tokens * sites[planned[0].site].hidden_size))
    state: State = {}
    for start in range(0, len(planned), at_once):
        part = planned[start : start + at_once]
        inputs = read_inputs(model, [sites[edit.site] for edit in part], batches)
        for i, edit in enumerate(part):
            progress("routed_ffn: converting FFNs", (start + i) / len(planned))
            state[edit.key] = convert_site(model, config, sites[edit.site], *inputs.pop(edit.site))
    return state


def _num_tokens(batches: list[dict[str, Tensor]]) -> int:
    return sum(int(next(iter(batch.values())).shape[:2].numel()) for batch in batches)


def read_inputs(
    model: nn.Module, sites: list[FFNSite], batches: list[dict[str, Tensor]], max_tokens: int = FIT_TOKENS
) -> dict[str, tuple[Tensor, Tensor]]:
    """What enters each FFN [n, d], and the squared norm of what leaves its block [n]; fp32.

    Where the batches hold twice `max_tokens` or more, only every second token or fewer, so that n is about as many.
    """
    every = max(1, _num_tokens(batches) // max_tokens)
    blocks = {block.ffn.name: block.name for block in describe(model).blocks if block.ffn is not None}
    inputs: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    sizes: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    mask: list[Tensor | None] = [None]

    def real(x: Tensor) -> Tensor:
        x = x.detach().reshape(-1, x.shape[-1])
        kept = mask[0]
        return (x[kept.reshape(-1)] if kept is not None and kept.numel() == len(x) else x)[::every].float()

    def on_input(name: str) -> Callable[..., None]:
        return lambda _module, args: inputs[name].append(real(args[0]))

    def on_output(name: str) -> Callable[..., None]:
        return lambda _module, _args, out: sizes[name].append(
            real(out[0] if isinstance(out, tuple) else out).square().sum(1)
        )

    hooks = []
    for site in sites:
        hooks.append(submodule(model, f"{site.name}.{site.up}").register_forward_pre_hook(on_input(site.name)))
        hooks.append(submodule(model, blocks[site.name]).register_forward_hook(on_output(site.name)))
    try:
        with blocks_only(model, submodule(model, blocks[sites[-1].name])) as run:
            for batch in batches:
                attention_mask = batch.get("attention_mask")
                mask[0] = attention_mask.bool() if attention_mask is not None and attention_mask.ndim == 2 else None
                run(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (torch.cat(inputs[name]), torch.cat(sizes[name])) for name in inputs}


@torch.no_grad()
def convert_site(model: nn.Module, config: RoutedFFN, site: FFNSite, x_nd: Tensor, size_n: Tensor) -> dict[str, Tensor]:
    """Order, router and compensation of one FFN, fitted on what `read_inputs` found for it."""
    ffn = ffn_weights(submodule(model, site.name), site)
    num_shared, _ = config.split(site.ffn_size)
    found = convert_ffn(
        ffn,
        x_nd,
        num_shared=num_shared,
        num_blocks=config.num_blocks,
        num_active=config.num_active,
        compensation=config.compensated_by,
        rank=config.rank(site.hidden_size),
        # an error counts relative to the residual stream it is added to
        weight_n=1 / size_n.clamp(min=1e-12),
        generator=torch.Generator().manual_seed(int(torch.randint(2**31, ()))),
    )
    state = {"order": found.order_f, "router.weight": found.router_weight_gd, "router.bias": found.router_bias_g}
    for name, tensor in (
        ("shift", found.block_shift_gd),
        ("skip_a", found.skip_a_rd),
        ("skip_b", found.skip_b_dr),
    ):
        if tensor is not None:
            state[f"router.{name}"] = tensor
    return state


def ffn_weights(owner: nn.Module, site: FFNSite) -> FFNWeights:
    """The base weights of a site's FFN as they stand, without LoRA; fp32 (a copy only if the model is not)."""
    up = linear_parts(owner.get_submodule(site.up), site.transposed)
    down = linear_parts(owner.get_submodule(site.down), site.transposed)
    gate = linear_parts(owner.get_submodule(site.gate), site.transposed) if site.gate else None
    return FFNWeights(
        up_fd=up.weight.detach().float(),
        down_df=down.weight.detach().float(),
        gate_fd=gate.weight.detach().float() if gate else None,
        up_bias_f=_fp32(up.bias),
        gate_bias_f=_fp32(gate.bias) if gate else None,
        down_bias_d=_fp32(down.bias),
        activation=site.activation,
    )


def _fp32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float()
