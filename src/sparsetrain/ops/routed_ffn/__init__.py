"""Routed FFN: every token uses the always-on hidden units and the blocks chosen for it (SPT, arXiv 2312.10365).

Hidden units are ordered [num_shared always on | block 0 | ... | block G-1], blocks of equal width (f - num_shared) / G.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.core.backend import choose
from sparsetrain.ops.routed_ffn.activations import ACTIVATIONS as ACTIVATIONS
from sparsetrain.ops.routed_ffn.cpu import grouped_ffn
from sparsetrain.ops.routed_ffn.problem import Problem
from sparsetrain.ops.routed_ffn.reference import reference_ffn

Lora = tuple[Tensor, Tensor]
GATE_MODES = ("output", "ste", "spt")
_RUN = {"cpu": grouped_ffn, "reference": reference_ffn}


def routed_ffn(
    x_td: Tensor,
    up_fd: Tensor,
    down_df: Tensor,
    choice_tk: Tensor,
    gate_tk: Tensor | None,
    *,
    gate_proj_fd: Tensor | None = None,
    up_bias_f: Tensor | None = None,
    gate_bias_f: Tensor | None = None,
    down_bias_d: Tensor | None = None,
    num_shared: int = 0,
    num_blocks: int,
    activation: str,
    gate_mode: str = "output",
    up_lora: Lora | None = None,
    gate_lora: Lora | None = None,
    down_lora: Lora | None = None,
    lora_dropout: float = 0.0,
    block_shift_gd: Tensor | None = None,
    valid_t: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y = b + FFN_shared(x) + Σ_{g in S} c_g FFN_g(x) + Σ_{g not in S} shift_g.

    FFN_g(x) = act(x W_gᵀ) W_down,gᵀ, or (act(x W_gate,gᵀ) * x W_up,gᵀ) W_down,gᵀ; LoRA is part of each product.
    gate_mode: `output` as above. `ste`: c has value 1 and the gradient of `gate_tk`. `spt`: the published form, c on
    every base product and LoRA ungated.

    Args:
        x_td: tokens [t, d].
        up_fd, gate_proj_fd, down_df: weights [f, d], [f, d] (None: not gated), [d, f]; any strides.
        choice_tk: distinct blocks of each token [t, k], integer.
        gate_tk: c of those blocks [t, k], or None for 1. k = G with None is the plain dense FFN, without sorting.
        up_lora, gate_lora, down_lora: (A [r, in], B [out, r]), the scale folded into B.
        lora_dropout: dropout on the LoRA inputs alone.
        block_shift_gd: what stands in for a block that is not chosen [G, d].
        valid_t: bool [t]; a token that is False uses no block.
        backend: auto, cpu or reference.

    Returns:
        y_td: [t, d] in the dtype of x (of autocast, where it is on).

    Raises:
        ValueError: sizes that do not fit, an unknown activation or gate mode.
        Unsupported: `backend="triton"`.
    """
    width = _check(
        x_td, up_fd, down_df, choice_tk, gate_tk, num_shared, num_blocks, activation, gate_mode, lora_dropout
    )
    name = choose("routed_ffn", backend, {"cpu": None, "reference": None, "triton": "no kernel is written for it yet"})
    device = x_td.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_td.dtype
    cast = lambda t: None if t is None else t.to(dtype)  # noqa: E731
    gated = gate_proj_fd is not None
    loras = [
        None if lora is None else (cast(lora[0]), cast(lora[1]))
        for lora in ((gate_lora, up_lora) if gated else (up_lora,))
    ]
    with torch.autocast(device, enabled=False):
        x_td = cast(x_td).contiguous()  # type: ignore[union-attr]
        a_rf, b_dr = (None, None) if down_lora is None else (cast(down_lora[0]), cast(down_lora[1]))
        keep_tf = None
        if lora_dropout and a_rf is not None:
            keep_tf = torch.rand(len(x_td), up_fd.shape[0], device=x_td.device) >= lora_dropout
            a_rf = a_rf / (1 - lora_dropout)
        gate_tk = cast(gate_tk)
        dense = gate_tk is None and choice_tk.shape[1] == num_blocks
        if gate_mode == "ste" and gate_tk is not None:
            gate_tk = 1 + (gate_tk - gate_tk.detach())
        shift_gd = None if dense else cast(block_shift_gd)
        start_d = cast(down_bias_d)
        if shift_gd is not None:
            start_d = shift_gd.sum(0) if start_d is None else start_d + shift_gd.sum(0)
        return _RUN[name](
            Problem(
                x_td=x_td,
                weights=tuple(cast(w) for w in ((gate_proj_fd, up_fd) if gated else (up_fd,))),  # type: ignore[misc]
                biases=tuple(cast(b) for b in ((gate_bias_f, up_bias_f) if gated else (up_bias_f,))),
                lora_b=tuple(None if lora is None else lora[1] for lora in loras),
                low_tr=_low(x_td, [lora[0] for lora in loras if lora is not None], lora_dropout),  # type: ignore[misc]
                down_df=cast(down_df),  # type: ignore[arg-type]
                lora_a_rf=a_rf,
                lora_b_dr=b_dr,
                keep_tf=keep_tf,
                start_d=start_d,
                shift_gd=shift_gd,
                choice_tk=None if dense else choice_tk,
                gate_tk=gate_tk,
                valid_t=valid_t,
                num_shared=up_fd.shape[0] if dense else num_shared,
                num_blocks=num_blocks,
                width=width,
                activation=activation,
                gates_base=gate_mode == "spt",
            )
        )


def _low(x_td: Tensor, factors: list[Tensor], dropout: float) -> Tensor | None:
    """x Aᵀ of the input LoRAs side by side; with dropout each draws its own mask, as separate adapters do."""
    if not factors:
        return None
    if not dropout:
        return F.linear(x_td, torch.cat(factors))
    return torch.cat([F.linear(F.dropout(x_td, dropout), a) for a in factors], 1)


def _check(
    x_td: Tensor,
    up_fd: Tensor,
    down_df: Tensor,
    choice_tk: Tensor,
    gate_tk: Tensor | None,
    num_shared: int,
    num_blocks: int,
    activation: str,
    gate_mode: str,
    dropout: float,
) -> int:
    """The width of a block, if the arguments fit."""
    ffn, hidden = up_fd.shape
    if num_blocks < 1 or not 0 <= num_shared < ffn or (ffn - num_shared) % num_blocks:
        raise ValueError(
            f"routed_ffn: {ffn} hidden units with num_shared={num_shared} do not divide into num_blocks={num_blocks}. "
            "Choose a number of blocks that divides the rest."
        )
    if down_df.shape != (hidden, ffn) or x_td.shape[1] != hidden:
        raise ValueError(
            f"routed_ffn: up {tuple(up_fd.shape)}, down {tuple(down_df.shape)}, x {tuple(x_td.shape)}. "
            "Pass up [f, d], down [d, f] and x [t, d]; transpose weights that are stored the other way."
        )
    if choice_tk.shape[0] != x_td.shape[0] or not 1 <= choice_tk.shape[1] <= num_blocks:
        raise ValueError(
            f"routed_ffn: choice {tuple(choice_tk.shape)} for {len(x_td)} tokens and {num_blocks} blocks. "
            "Pass [t, k] with k between 1 and num_blocks."
        )
    if gate_tk is not None and gate_tk.shape != choice_tk.shape:
        raise ValueError(
            f"routed_ffn: gate {tuple(gate_tk.shape)}, choice {tuple(choice_tk.shape)}. Pass one c per choice."
        )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"routed_ffn: activation {activation!r} is unknown. Choose one of {', '.join(sorted(ACTIVATIONS))}."
        )
    if gate_mode not in GATE_MODES:
        raise ValueError(f"routed_ffn: gate_mode {gate_mode!r} is unknown. Choose one of {', '.join(GATE_MODES)}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"routed_ffn: lora_dropout={dropout} is out of range. It must lie in [0, 1).")
    return (ffn - num_shared) // num_blocks
