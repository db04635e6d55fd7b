"""Routed FFN: every token uses the always-on hidden units and the blocks chosen for it (SPT, arXiv 2312.10365).

Hidden units are ordered [num_shared always on | block 0 | ... | block G-1], blocks of equal width (f - num_shared) / G.
"""

from __future__ import annotations

from torch import Tensor, autocast, dtype, get_autocast_dtype, is_autocast_enabled

from sparsetrain.core.backend import asked_for, choose
from sparsetrain.ops.linear_parts import LinearParts
from sparsetrain.ops.routed_ffn import grouped
from sparsetrain.ops.routed_ffn.activations import ACTIVATIONS as ACTIVATIONS
from sparsetrain.ops.routed_ffn.choice import best_first
from sparsetrain.ops.routed_ffn.choice import on_device as on_device
from sparsetrain.ops.routed_ffn.problem import Problem, linear_operands
from sparsetrain.ops.routed_ffn.reference import reference_ffn
from sparsetrain.ops.routed_ffn.torch import grouped_ffn

GATE_MODES = ("output", "ste", "spt")
_RUN = {"grouped_mm": grouped.device_ffn, "torch": grouped_ffn, "reference": reference_ffn}


def routed_ffn(
    x_td: Tensor,
    up: LinearParts,
    down: LinearParts,
    choice_tk: Tensor,
    gate_tk: Tensor | None,
    *,
    gate: LinearParts | None = None,
    num_shared: int = 0,
    num_blocks: int,
    activation: str,
    gate_mode: str = "output",
    block_shift_gd: Tensor | None = None,
    valid_t: Tensor | None = None,
    dense_t: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y = b + FFN_shared(x) + Σ_{g in S} c_g FFN_g(x) + Σ_{g not in S} shift_g.

    FFN_g(x) = act(x W_gᵀ) W_down,gᵀ, or (act(x W_gate,gᵀ) * x W_up,gᵀ) W_down,gᵀ; LoRA is part of each product.
    gate_mode: `output` as above. `ste`: c has value 1 and the gradient of `gate_tk`. `spt`: the published form, c on
    every base product and LoRA ungated.

    Args:
        x_td: tokens [t, d].
        up, gate, down: linears with weights [f, d], [f, d] (None: not gated), [d, f]; any strides.
        choice_tk: distinct blocks of each token [t, k], integer.
        gate_tk: c of those blocks [t, k], or None for 1. k = G with None is the plain dense FFN, without sorting.
        block_shift_gd: what stands in for a block that is not chosen [G, d].
        valid_t: bool [t]; a token that is False uses no block. dense_t: one that is True uses the dense FFN instead.
        backend: auto | reference | torch (tiles; the host reads the loads) | grouped_mm (a GPU's grouped products).

    Returns: y_td [t, d] in the dtype of x (of autocast, where it is on).

    Raises:
        ValueError: sizes that do not fit, an unknown activation or gate mode.
        Unsupported: the named backend cannot run this call.
    """
    _check_linears(x_td, up, down, gate, num_shared, num_blocks)
    _check_routes(len(x_td), choice_tk, gate_tk, num_blocks, activation, gate_mode)
    work = _dtype(x_td)
    x_td, up, down = x_td.to(work).contiguous(), up.to(work), down.to(work)
    dense = gate_tk is None and choice_tk.shape[1] == num_blocks
    shift_gd = None if dense or block_shift_gd is None else block_shift_gd.to(work)
    with autocast(x_td.device.type, enabled=False):
        problem = Problem(
            **linear_operands(x_td, up, down, gate.to(work) if gate else None),
            start_d=_start(down.bias, shift_gd),
            shift_gd=shift_gd,
            choice_tk=None if dense else choice_tk,
            gate_tk=_gates(gate_tk if gate_tk is None else gate_tk.to(work), gate_mode),
            valid_t=valid_t,
            dense_t=None if dense else dense_t,
            num_shared=up.weight.shape[0] if dense else num_shared,
            num_blocks=num_blocks,
            width=(up.weight.shape[0] - num_shared) // num_blocks,
            activation=activation,
            gates_base=gate_mode == "spt",
        )
        return _RUN[choose("routed_ffn", backend, best_first(problem, timed=asked_for(backend) == "auto"))](problem)


def _dtype(x_td: Tensor) -> dtype:
    kind = x_td.device.type
    return get_autocast_dtype(kind) if is_autocast_enabled(kind) else x_td.dtype


def _gates(gate_tk: Tensor | None, gate_mode: str) -> Tensor | None:
    return gate_tk if gate_tk is None or gate_mode != "ste" else 1 + (gate_tk - gate_tk.detach())


def _start(bias_d: Tensor | None, shift_gd: Tensor | None) -> Tensor | None:
    """What every token begins with: the bias, and the stand-ins of all blocks, as if none were chosen."""
    if shift_gd is None:
        return bias_d
    return shift_gd.sum(0) if bias_d is None else bias_d + shift_gd.sum(0)


def _check_linears(
    x_td: Tensor, up: LinearParts, down: LinearParts, gate: LinearParts | None, num_shared: int, num_blocks: int
) -> None:
    ffn, hidden = up.weight.shape
    if num_blocks < 1 or not 0 <= num_shared < ffn or (ffn - num_shared) % num_blocks:
        raise ValueError(
            f"routed_ffn: {ffn} hidden units with num_shared={num_shared} do not divide into num_blocks={num_blocks}. "
            "Choose a number of blocks that divides the rest."
        )
    if down.weight.shape != (hidden, ffn) or x_td.shape[1] != hidden or (gate and gate.weight.shape != (ffn, hidden)):
        raise ValueError(
            f"routed_ffn: up {tuple(up.weight.shape)}, down {tuple(down.weight.shape)}, gate "
            f"{tuple(gate.weight.shape) if gate else None}, x {tuple(x_td.shape)}. "
            "Pass up and gate [f, d], down [d, f] and x [t, d]; transpose weights that are stored the other way."
        )
    for name, linear in (("up", up), ("down", down), ("gate", gate)):
        if linear is not None and not 0 <= linear.lora_dropout < 1:
            raise ValueError(
                f"routed_ffn: lora_dropout={linear.lora_dropout} of {name} is out of range. It must lie in [0, 1)."
            )


def _check_routes(
    num_tokens: int, choice_tk: Tensor, gate_tk: Tensor | None, num_blocks: int, activation: str, gate_mode: str
) -> None:
    if choice_tk.shape[0] != num_tokens or not 1 <= choice_tk.shape[1] <= num_blocks:
        raise ValueError(
            f"routed_ffn: choice {tuple(choice_tk.shape)} for {num_tokens} tokens and {num_blocks} blocks. "
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
