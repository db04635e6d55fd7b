"""Time of a training step from a machine's rates: each kind of work takes the longer of its arithmetic and its bytes.

t = Σ_kinds max(FLOPs / rate, bytes / bandwidth) + calls · overhead, for forward and backward, and AdamW's bytes.
The rates are those that such operations reach; the sum says which of two recipes is faster better than how fast it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sparsetrain.planner.machines import MachineRates
from sparsetrain.planner.outline import Outline
from sparsetrain.planner.traced_step import Work

ADAMW_MOVES = 7
"""AdamW reads parameter, gradient and two moments and writes three of them: 28 bytes for 4 (performance page, 2.8)."""

LENGTHS = tuple(2**power for power in range(8, 18))
"""Where break-even is looked for: 256 to 131,072 tokens."""

WINS = 0.97
"""Faster means less than 0.97 of the dense time; within 3 % is a tie, as in `measure.timing`."""


def work_seconds(work: Work, rates: MachineRates, dtype: str) -> float:
    """Seconds of the work of a step.

    Args:
        work: kind -> (amount, bytes, calls).
        rates: of the machine.
        dtype: of the matrix products, `fp32` or `bf16`.
    """
    total = 0.0
    for kind, (amount, moved, calls) in work.items():
        rate = {"gemm": rates.gemm(dtype), "attention": rates.attention_flops, "exp": rates.exp_per_s}.get(kind)
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
    return grad_accum * work_seconds(work, rates, dtype) + moved / rates.copy_bytes_per_s


def break_even(
    sparse: Callable[[int], float], dense: Callable[[int], float], lengths: Sequence[int] = LENGTHS
) -> int | None:
    """The first length from which the sparse step stays faster than the dense one; None if it never does.

    Args:
        sparse, dense: tokens -> seconds of a step.
        lengths: rising.
    """
    found = None
    for tokens in lengths:
        wins = sparse(tokens) < WINS * dense(tokens)
        if wins and found is None:
            found = tokens
        if not wins:
            found = None
    return found
