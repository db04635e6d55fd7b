"""Shapes and tolerances of the loss on selected rows, read by the tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call; about 0.6 of the rows have a target."""

    name: str
    rows: int
    hidden: int
    words: int

    def arguments(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of `selected_loss`; tensors are leaves that ask for a gradient."""
        generator = torch.Generator().manual_seed(seed)
        make = lambda *shape: torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()  # noqa: E731
        target = torch.randint(self.words, (self.rows,), generator=generator)
        target[torch.rand(self.rows, generator=generator) < 0.4] = -100
        leaves = {"x_nd": make(self.rows, self.hidden), "weight_vd": make(self.words, self.hidden)}
        return leaves | {"target_n": target, "bias_v": make(self.words)}


TINY = (
    Case(name="odd", rows=37, hidden=7, words=19),
    Case(name="small", rows=6, hidden=3, words=5),
    Case(name="one_row", rows=1, hidden=3, words=5),
)

REAL = tuple(
    Case(name=f"n{n}_d{d}_v{v}", rows=n, hidden=d, words=v)
    for d, v in ((576, 49_152), (2048, 128_256))
    for n in (1024, 4096)
)
"""SmolLM2 and Llama-3.2-1B."""

TOLERANCE = {"loss": 1e-12, "gradient": 1e-10}
"""Relative, in fp64, against cross-entropy of all logits."""
