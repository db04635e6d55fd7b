"""Bytes of an optimizer's state, by the names of transformers' `optim`. Plain numbers: no library is asked.

m, v: first and second moment. bitsandbytes stores those of 4,096 numbers or more as a byte each, with an fp32 scale for
every 256, and pages those of 100,000 or more between the GPU's memory and the CPU's; the others are fp32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

DEFAULT = "adamw_torch_fused"
_BLOCK, _LEAST_8BIT, _LEAST_PAGED = 256, 4096, 100_000
_STEP = 4


@dataclass(frozen=True)
class Shape:
    """Of a trained parameter. itemsize: bytes of a number."""

    sizes: tuple[int, ...]
    itemsize: int

    @property
    def count(self) -> int:
        total = 1
        for size in self.sizes:
            total *= size
        return total


@dataclass(frozen=True)
class Kind:
    """moments: kept for each number. bits: of each; 0: as wide as the parameter. paged: they may wait on the host.
    factored: v by rows and columns. steps: 4 more bytes for each parameter: torch's step, Adafactor's RMS.
    """

    moments: int
    bits: int = 0
    paged: bool = False
    factored: bool = False
    steps: bool = False


_ADAMW = Kind(2, steps=True)
KINDS: dict[str, Kind] = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_torch_xla"), _ADAMW),
    "adafactor": Kind(1, factored=True, steps=True),
    "sgd": Kind(0),
    "adagrad": Kind(1, steps=True),
    "rmsprop": Kind(1, steps=True),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), Kind(2, bits=8)),
    "paged_adamw": Kind(2, bits=32, paged=True),
    "paged_adamw_32bit": Kind(2, bits=32, paged=True),
    "paged_adamw_8bit": Kind(2, bits=8, paged=True),
    "lion_32bit": Kind(1, bits=32),
    "lion_8bit": Kind(1, bits=8),
    "paged_lion_32bit": Kind(1, bits=32, paged=True),
    "paged_lion_8bit": Kind(1, bits=8, paged=True),
}
"""Of `optim`'s names those whose state is known; any other is planned as AdamW, which keeps the most."""


def state_bytes(optim: str, trained: Iterable[Shape]) -> tuple[int, int]:
    """(bytes on the device, bytes that may wait in the CPU's memory) of the state for these parameters."""
    kind = KINDS.get(optim, _ADAMW)
    here = host = 0
    for shape in trained:
        size = _of_one(kind, shape)
        paged = kind.paged and shape.count >= _LEAST_PAGED
        here, host = (here, host + size) if paged else (here + size, host)
    return here, host


def _of_one(kind: Kind, shape: Shape) -> int:
    if kind.factored:
        if len(shape.sizes) < 2:
            return 4 * shape.count + _STEP
        *outer, rows, columns = shape.sizes
        return 4 * Shape(tuple(outer), 4).count * (rows + columns) + _STEP
    if kind.bits == 8 and shape.count >= _LEAST_8BIT:
        scales = 4 * -(-shape.count // _BLOCK)
        return kind.moments * (shape.count + scales)
    width = 4 if kind.bits else shape.itemsize
    return kind.moments * width * shape.count + (_STEP if kind.steps else 0)
