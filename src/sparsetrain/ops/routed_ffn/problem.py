"""What a routed FFN computes, after the arguments are checked: the one input of every backend."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.ops.linear_parts import LinearParts


class Problem(NamedTuple):
    """Operands of one call; tuples hold the gate projection before the up projection, or up alone.

    x_td: tokens. weights: [f, d] each. biases: [f] or None. lora_b: [f, r] or None.
    low_tr: x Aᵀ of the input LoRAs side by side, or None. keep_tf: False where dropout drops h before `lora_a_rf`.
    down_df, lora_a_rf, lora_b_dr: the down projection and its LoRA. start_d: added to every token, or None.
    shift_gd: a block's stand-in where it is not chosen; its total is already in `start_d`.
    choice_tk: chosen blocks, or None if all units are always on. gate_tk: their gates c, or None for 1.
    dense_t: tokens that go through the dense FFN; None without choice. gates_base: gate_mode "spt".
    """

    x_td: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    lora_b: tuple[Tensor | None, ...]
    low_tr: Tensor | None
    down_df: Tensor
    lora_a_rf: Tensor | None
    lora_b_dr: Tensor | None
    keep_tf: Tensor | None
    start_d: Tensor | None
    shift_gd: Tensor | None
    choice_tk: Tensor | None
    gate_tk: Tensor | None
    valid_t: Tensor | None
    dense_t: Tensor | None
    num_shared: int
    num_blocks: int
    width: int
    activation: str
    gates_base: bool


def linear_operands(x_td: Tensor, up: LinearParts, down: LinearParts, gate: LinearParts | None) -> dict[str, Any]:
    """The fields of a problem that come from x and the linears, all of one dtype; draws the dropout of their LoRA."""
    inputs = (up,) if gate is None else (gate, up)
    a_rf, b_dr = (None, None) if down.lora is None else down.lora
    keep_tf = None
    if down.lora_dropout and a_rf is not None:
        keep_tf = torch.rand(len(x_td), a_rf.shape[1], device=x_td.device) >= down.lora_dropout
        a_rf = a_rf / (1 - down.lora_dropout)
    return {
        "x_td": x_td,
        "weights": tuple(linear.weight for linear in inputs),
        "biases": tuple(linear.bias for linear in inputs),
        "lora_b": tuple(None if linear.lora is None else linear.lora[1] for linear in inputs),
        "low_tr": _low(x_td, [(linear.lora[0], linear.lora_dropout) for linear in inputs if linear.lora is not None]),
        "down_df": down.weight,
        "lora_a_rf": a_rf,
        "lora_b_dr": b_dr,
        "keep_tf": keep_tf,
    }


def _low(x_td: Tensor, factors: list[tuple[Tensor, float]]) -> Tensor | None:
    """x Aᵀ of the input LoRAs side by side; with dropout each draws its own mask, as separate adapters do."""
    if not factors:
        return None
    if not any(dropout for _, dropout in factors):
        return F.linear(x_td, torch.cat([a for a, _ in factors]))
    return torch.cat([F.linear(F.dropout(x_td, dropout) if dropout else x_td, a) for a, dropout in factors], 1)


def with_dense_tokens(p: Problem) -> Problem:
    """The same problem without `dense_t`: a dense token is one that chooses every block with c = 1.

    The stand-ins that it started with cancel. So it shares the tiles of the others: no second pass over the weights,
    and nothing is computed that is not used.
    """
    if p.dense_t is None or p.choice_tk is None:
        return p
    dense_t1, blocks_g = p.dense_t[:, None], torch.arange(p.num_blocks, device=p.x_td.device)
    chosen = p.choice_tk.shape[1]
    more = (0, p.num_blocks - chosen)
    used_tg = blocks_g < chosen
    used_tg = used_tg if p.valid_t is None else used_tg & p.valid_t[:, None]
    return p._replace(
        choice_tk=torch.where(dense_t1, blocks_g, F.pad(p.choice_tk.long(), more)),
        gate_tk=None if p.gate_tk is None else torch.where(dense_t1, 1, F.pad(p.gate_tk, more)),
        valid_t=used_tg | dense_t1,
        dense_t=None,
    )
