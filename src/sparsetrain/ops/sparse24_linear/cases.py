"""Shapes and tolerances of the 2:4 linear, read by the tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: x [*tokens, inputs], weight [outputs, inputs]."""

    name: str
    tokens: tuple[int, ...]
    outputs: int
    inputs: int


TINY = (
    Case(name="batch", tokens=(2, 9), outputs=12, inputs=8),
    Case(name="odd", tokens=(3, 7), outputs=12, inputs=8),
    Case(name="one_axis", tokens=(16,), outputs=12, inputs=8),
    Case(name="few_tokens", tokens=(1, 3), outputs=12, inputs=8),
)
"""In the plain-PyTorch form; `few_tokens` is too short a group for MVUE."""

REAL = (
    Case(name="small", tokens=(192,), outputs=256, inputs=128),
    *(Case(name=f"gpt_{d}", tokens=(2048,), outputs=4 * d, inputs=d) for d in (256, 512, 768)),
)
"""Multiples of 64 throughout, as sparse tensor cores want; tests run the first."""

TOLERANCE = {"emulate": 1e-12, "kernel": 1e-2}
"""Emulation in fp64 by element; kernels in bf16 by |difference| / |value| of whole tensors."""
