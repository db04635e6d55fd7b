"""What a routed FFN computes, after the arguments are checked: the one input of every backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """Operands of one call; tuples hold the gate projection before the up projection, or up alone.

    x_td: tokens. weights: [f, d] each. biases: [f] or None. lora_b: [f, r] or None.
    low_tr: x Aᵀ of the input LoRAs side by side, or None. keep_tf: False where dropout drops h before `lora_a_rf`.
    down_df, lora_a_rf, lora_b_dr: the down projection and its LoRA. start_d: added to every token, or None.
    shift_gd: a block's stand-in where it is not chosen; its total is already in `start_d`.
    choice_tk: chosen blocks, or None if all units are always on. gate_tk: their gates c, or None for 1.
    gates_base: gate_mode "spt".
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
    num_shared: int
    num_blocks: int
    width: int
    activation: str
    gates_base: bool
