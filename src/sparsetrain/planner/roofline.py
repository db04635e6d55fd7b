"""Time of a training step from a machine's rates: each kind of work takes the longer of its arithmetic and its bytes.

t = Σ_kinds max(FLOPs / rate, bytes / bandwidth) + calls · overhead, for forward and backward, and AdamW's bytes.
The rates are those that such operations reach; the sum says which of two recipes is faster better than how fast it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from sparsetrain.planner.machines import MachineRates
from sparsetrain.planner.outline import Outline
from sparsetrain.planner.traced_step import Work

ADAMW_MOVES = 7
"""AdamW reads parameter, gradient and two moments and writes three of them: 28 bytes for 4 (performance page, 2.8)."""

LENGTHS = tuple(2**power for power in range(8, 18))
"""The lengths at which two recipes are compared: 256 to 131,072 tokens."""

WINS = 0.97
"""Faster means less than 0.97 of the dense time; within 3 % is a tie, as in `measure.timing`."""


def work_seconds(work: Work, rates: MachineRates, dtype: str) -> float:
    """Seconds of the work of a step.

    Args:
        work: kind -> (amount, bytes, calls).
        rates: of the machine.
        dtype: of the matrix products, `fp32` or `bf16`; those of kind `gemm fp32` are in fp32 whatever it is.
    """
    total = 0.0
    flops = {"gemm": rates.gemm(dtype), "gemm fp32": rates.gemm("fp32")}
    flops |= {"attention": rates.attention_flops, "exp": rates.exp_per_s}
    for kind, (amount, moved, calls) in work.items():
        rate = flops.get(kind)
        if kind == "host":
            total += moved / rates.host_bytes_per_s
            continue
        arithmetic = amount / rate if rate else 0.0
        # a fused attention reads its keys once a tile: its registered bytes are those of its arguments
        total += max(arithmetic, moved / rates.copy_bytes_per_s) + calls * rates.call_s
    return total


def step_seconds(
    outline: Outline, rates: MachineRates, *, tokens: int, batch: int = 1, grad_accum: int = 1, dtype: str
) -> float:
    """Seconds of one optimizer step."""
    work = outline.work(tokens, batch)
    # operations of a model whose blocks are traced once are all counted: `work` walks every block
    moved = ADAMW_MOVES * outline.static.gradients
    paged = 2 * outline.static.optimizer_on_host  # there and back, at the worst
    return (
        grad_accum * work_seconds(work, rates, dtype) + moved / rates.copy_bytes_per_s + paged / rates.host_bytes_per_s
    )


def faster_at(
    sparse: Callable[[int], float], dense: Callable[[int], float], lengths: Sequence[int] = LENGTHS
) -> tuple[tuple[int, int], ...]:
    """Where the sparse step is faster than the dense one: (first, last) length of each stretch.

    Args:
        sparse, dense: tokens -> seconds of a step.
        lengths: those that are tried, rising.
    """
    tried = [(tokens, sparse(tokens) < WINS * dense(tokens)) for tokens in lengths]
    stretches = [[tokens for tokens, _ in group] for wins, group in groupby(tried, lambda each: each[1]) if wins]
    return tuple((stretch[0], stretch[-1]) for stretch in stretches)
