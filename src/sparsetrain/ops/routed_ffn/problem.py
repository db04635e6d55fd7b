from __future__ import annotations
from typing import NamedTuple
from torch import Tensor
from sparsetrain.ops.routing import Grouping

class Problem(NamedTuple):
    x_td: Tensor
    weights: tuple
    biases: tuple
    lora_b: tuple
    low_tr: Tensor | None
    down_df: Tensor
    lora_a_rf: Tensor | None
    keep_tf: Tensor | None
    start_d: Tensor | None
    shift_gd: Tensor | None
    gate_tk: Tensor | None
    groups: Grouping | None
    lora_b_dr: Tensor | None
    num_shared: int
    width: int
    activation: str
    gates_base: bool
