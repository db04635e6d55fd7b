"""The routed FFN as a loop over all blocks, each computed for all tokens and masked: the specification."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain.ops.routed_ffn.activations import ACTIVATIONS
from sparsetrain.ops.routed_ffn.problem import Problem


def reference_ffn(p: Problem) -> Tensor:
    """y = start + FFN_shared(x) + Σ_g [g in S] (c_g FFN_g(x) - shift_g), differentiable, fp32 accumulation.

    With `gates_base`, FFN_g has c on every base product and none on LoRA (SPT, arXiv 2312.10365, official code).
    Where `dense_t`, y is that of all blocks with c = 1.
    """
    if p.dense_t is not None:
        bias_d = p.start_d if p.shift_gd is None or p.start_d is None else p.start_d - p.shift_gd.sum(0)
        plain = {"start_d": bias_d, "shift_gd": None, "choice_tk": None, "gate_tk": None, "dense_t": None}
        dense_td = reference_ffn(p._replace(**plain, num_shared=len(p.weights[0])))
        return torch.where(p.dense_t[:, None], dense_td, reference_ffn(p._replace(dense_t=None)))
    up = lambda t: t.float() if t.dtype in (torch.float16, torch.bfloat16) else t  # noqa: E731
    x_td = up(p.x_td)
    y_td = torch.zeros_like(x_td) if p.start_d is None else up(p.start_d).expand_as(x_td)
    if p.num_shared:
        y_td = y_td + _units(p, slice(0, p.num_shared), None, None, up)
    for block in range(p.num_blocks if p.choice_tk is not None else 0):
        chosen_tk = p.choice_tk == block  # type: ignore[operator]
        if p.valid_t is not None:
            chosen_tk = chosen_tk & p.valid_t[:, None]
        on_t1 = chosen_tk.any(1, keepdim=True).to(x_td.dtype)
        c_t1 = on_t1 if p.gate_tk is None else (up(p.gate_tk) * chosen_tk).sum(1, keepdim=True)
        start = p.num_shared + block * p.width
        y_td = y_td + _units(p, slice(start, start + p.width), c_t1, on_t1, up)
        if p.shift_gd is not None:
            y_td = y_td - on_t1 * up(p.shift_gd[block])
    return y_td.to(p.x_td.dtype)


def _units(p: Problem, units: slice, c_t1: Tensor | None, on_t1: Tensor | None, up: Any) -> Tensor:
    """What some hidden units add to y: always on if `c_t1` is None."""
    column, pres = 0, []
    for weight, bias, b in zip(p.weights, p.biases, p.lora_b):
        pre = up(p.x_td) @ up(weight[units]).t()
        if bias is not None:
            pre = pre + up(bias[units])
        if p.gates_base and c_t1 is not None:
            pre = c_t1 * pre
        if b is not None and p.low_tr is not None:
            pre = pre + up(p.low_tr[:, column : column + b.shape[1]]) @ up(b[units]).t()
            column += b.shape[1]
        pres.append(pre)
    h_tu = ACTIVATIONS[p.activation][0](pres[0])
    if len(pres) == 2:
        h_tu = h_tu * pres[1]
    y_td = h_tu @ up(p.down_df[:, units]).t()
    if c_t1 is not None:
        y_td = c_t1 * y_td
    if p.lora_a_rf is None or p.lora_b_dr is None:
        return y_td
    if p.keep_tf is not None:
        h_tu = h_tu * p.keep_tf[:, units]
    low_tr = h_tu @ up(p.lora_a_rf[:, units]).t()
    if c_t1 is not None and on_t1 is not None:
        low_tr = (on_t1 if p.gates_base else c_t1) * low_tr
    return y_td + low_tr @ up(p.lora_b_dr).t()
