"""The routed FFN through PyTorch's grouped products: one stable sort on the device, and the host waits for nothing.

Pairs of (token, block) are sorted by block; a product of all blocks is one kernel that reads where each block's rows
end. Weights are read where they lie, LoRA is a second product of its rank. Rows go to their places and come back by
gathers, the inverse of each other, so that no sum depends on the order of atomics.

Legend: p places of the sorted pairs, u hidden units of a block, r LoRA rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparsetrain.ops.routed_ffn.activations import ACTIVATIONS
from sparsetrain.ops.routed_ffn.problem import Problem, with_dense_tokens
from sparsetrain.ops.routing import Grouping, group_by_block

ALIGNED_BYTES = 16
"""What every row stride of a grouped product is a multiple of."""


def unable_on(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a device has none for a dtype, whatever the shapes; None if it has."""
    if device.type not in ("cuda", "cpu"):
        return f"PyTorch has no grouped product on {device.type}"
    if device.type == "cuda" and (
        dtype != torch.bfloat16 or torch.cuda.get_device_capability(device)[0] not in (9, 10)
    ):
        # elsewhere PyTorch reads the offsets on the host, block by block (pytorch#184334)
        return f"grouped products stay on the device in bf16 on compute capability 9 and 10 alone, not in {dtype} here"
    return None


def unable(p: Problem) -> str | None:
    """Why grouped products cannot run this call; None if they can."""
    x = p.x_td
    if reason := unable_on(x.device, x.dtype):
        return reason
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"grouped products are not written for {x.dtype}"
    ranks = [b.shape[1] for b in (*p.lora_b, p.lora_b_dr) if b is not None]
    sizes = {"model width": x.shape[1], "block width": p.width, "always-on units": p.num_shared}
    sizes |= {f"LoRA rank {rank}": rank for rank in ranks}
    odd = [f"{name} {size}" for name, size in sizes.items() if size * x.itemsize % ALIGNED_BYTES]
    return f"rows of grouped products are multiples of {ALIGNED_BYTES} bytes, not {', '.join(odd)}" if odd else None


def device_ffn(p: Problem) -> Tensor:
    """y [t, d]; the equation is that of `reference.py`."""
    p = with_dense_tokens(p)
    y_td = p.x_td.new_zeros(p.x_td.shape) if p.start_d is None else p.start_d.expand(p.x_td.shape)
    low_tr = None
    if p.num_shared:
        base, low_tr = _shared(p)
        y_td = y_td + base
    if p.choice_tk is not None:
        base, low = _routed(p, group_by_block(p.choice_tk, p.num_blocks, p.valid_t))
        y_td = y_td + base
        low_tr = low if low_tr is None else low_tr if low is None else low_tr + low
        if p.shift_gd is not None:
            y_td = y_td - _chosen(p).to(y_td.dtype) @ p.shift_gd
    return y_td if low_tr is None or p.lora_b_dr is None else torch.addmm(y_td, low_tr, p.lora_b_dr.t())


def _shared(p: Problem) -> tuple[Tensor, Tensor | None]:
    """(y [t, d], h A [t, r]) of the units that are always on."""
    units, pres = slice(0, p.num_shared), []
    for weight, bias, b, columns in zip(p.weights, p.biases, p.lora_b, _low_columns(p)):
        pre = F.linear(p.x_td, weight[units], None if bias is None else bias[units])
        if b is not None and p.low_tr is not None:
            pre = torch.addmm(pre, p.low_tr[:, columns], b[units].t())
        pres.append(pre)
    h_tu = _hidden(p, pres)
    y_td = h_tu @ p.down_df[:, units].t()
    if p.lora_a_rf is None:
        return y_td, None
    return y_td, (h_tu if p.keep_tf is None else h_tu * p.keep_tf[:, units]) @ p.lora_a_rf[:, units].t()


def _routed(p: Problem, groups: Grouping) -> tuple[Tensor, Tensor | None]:
    """(y [t, d], h A [t, r]) of the chosen blocks."""
    ends = groups.offsets[1:].int()
    counted = None if p.valid_t is None else torch.arange(len(groups.token_p), device=ends.device) < ends[-1]
    rows = lambda x: _ToPlaces.apply(x, groups.token_p, groups.inverse_tk)  # noqa: E731
    back = lambda x: _FromPlaces.apply(x, groups.token_p, groups.inverse_tk)  # noqa: E731
    times = lambda x, w: _Product.apply(x, w, ends, counted)  # noqa: E731
    block_p = p.choice_tk.reshape(-1)[groups.order_p]  # type: ignore[union-attr]
    c_p1 = None if p.gate_tk is None else p.gate_tk.reshape(-1)[groups.order_p][:, None]
    x_pd, pres = rows(p.x_td), []
    low_pr = None if p.low_tr is None else rows(p.low_tr)
    for weight, bias, b, columns in zip(p.weights, p.biases, p.lora_b, _low_columns(p)):
        pre = times(x_pd, _rows_of_blocks(weight, p).mT)
        pre = pre if bias is None else pre + bias[p.num_shared :].view(p.num_blocks, -1)[block_p]
        pre = pre * c_p1 if c_p1 is not None and p.gates_base else pre
        if b is not None and low_pr is not None:
            pre = pre + times(low_pr[:, columns].contiguous(), _rows_of_blocks(b, p).mT)
        pres.append(pre)
    h_pu = _hidden(p, pres)
    gated_pu = h_pu if c_p1 is None else h_pu * c_p1
    y_td = back(times(gated_pu, _columns_of_blocks(p.down_df, p)))
    if p.lora_a_rf is None:
        return y_td, None
    low_pu = h_pu if p.gates_base else gated_pu
    if p.keep_tf is not None:
        low_pu = low_pu * p.keep_tf[:, p.num_shared :].unflatten(1, (p.num_blocks, -1))[groups.token_p, block_p]
    return y_td, back(times(low_pu, _columns_of_blocks(p.lora_a_rf, p)))


def _hidden(p: Problem, pres: list[Tensor]) -> Tensor:
    h = ACTIVATIONS[p.activation][0](pres[0])
    return h * pres[1] if len(pres) == 2 else h


def _chosen(p: Problem) -> Tensor:
    """[t, G] bool: the token uses the block."""
    choice_tk, valid = p.choice_tk, p.valid_t
    assert choice_tk is not None
    valid_tk = torch.ones_like(choice_tk, dtype=torch.bool) if valid is None else valid.view(len(valid), -1)
    chosen = torch.zeros(len(choice_tk), p.num_blocks + 1, dtype=torch.bool, device=choice_tk.device)
    return chosen.scatter_(1, choice_tk.long().masked_fill(~valid_tk, p.num_blocks), True)[:, :-1]


def _rows_of_blocks(x_fn: Tensor, p: Problem) -> Tensor:
    return x_fn[p.num_shared :].unflatten(0, (p.num_blocks, p.width))


def _columns_of_blocks(x_nf: Tensor, p: Problem) -> Tensor:
    """[n, f] -> [G, u, n], a view: the kernel walks its columns."""
    return x_nf[:, p.num_shared :].unflatten(1, (p.num_blocks, p.width)).permute(1, 2, 0)


def _low_columns(p: Problem) -> list[slice]:
    """Where each input's LoRA stands in `low_tr`."""
    stops, at = [], 0
    for b in p.lora_b:
        stops.append(slice(at, at + (0 if b is None else b.shape[1])))
        at = stops[-1].stop
    return stops


class _Product(torch.autograd.Function):
    """x [p, n] times w [G, n, m], each row by its block's: [p, m]; rows that belong to no block give zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, ends: Tensor, counted: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w, ends, counted)
        return _zero_rest(F.grouped_mm(x, w, offs=ends), counted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, w, ends, counted = ctx.saved_tensors
        dy = dy.contiguous()
        dx = _zero_rest(F.grouped_mm(dy, w.mT, offs=ends), counted) if ctx.needs_input_grad[0] else None
        return dx, None if x is None else F.grouped_mm(x.t(), dy, offs=ends), None, None


def _zero_rest(y: Tensor, counted: Tensor | None) -> Tensor:
    """Grouped products leave the rows after the last block as they found the memory."""
    return y if counted is None else y.masked_fill_(~counted[:, None], 0)


class _ToPlaces(torch.autograd.Function):
    """Rows of tokens at the places of their pairs; the gradient is gathered back, not added by atomics."""

    @staticmethod
    def forward(ctx: Any, x_tn: Tensor, token_p: Tensor, inverse_tk: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_tk)
        return x_tn.index_select(0, token_p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_pn: Tensor) -> tuple[Tensor, None, None]:
        return _sum_of(dx_pn, *ctx.saved_tensors), None, None


class _FromPlaces(torch.autograd.Function):
    """The sum of each token's pairs; the gradient goes to all of them."""

    @staticmethod
    def forward(ctx: Any, x_pn: Tensor, token_p: Tensor, inverse_tk: Tensor) -> Tensor:
        ctx.save_for_backward(token_p)
        return _sum_of(x_pn, inverse_tk)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_tn: Tensor) -> tuple[Tensor, None, None]:
        return dy_tn.index_select(0, *ctx.saved_tensors), None, None


def _sum_of(x_pn: Tensor, inverse_tk: Tensor) -> Tensor:
    """[t, n]: one gather a slot, so that no [t, k, n] is made."""
    total = x_pn.index_select(0, inverse_tk[:, 0])
    for slot in range(1, inverse_tk.shape[1]):
        total += x_pn.index_select(0, inverse_tk[:, slot])
    return total
