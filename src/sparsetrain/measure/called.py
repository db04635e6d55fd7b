"""What the sides of a report are called: a run whose model grew stands where a sparse one stands, and is none."""

from __future__ import annotations

import re

from sparsetrain.measure.schema import Run

_GROWN = {"sparse": "grown", "Sparse": "Grown", "sparsity": "growth", "Sparsity": "Growth"}


def called(side: str, runs: dict[str, Run]) -> str:
    """The name of a side (of `schema.RUNS`) for a reader."""
    return _GROWN.get(side, side) if _grows(runs) else side


def in_words(text: str, runs: dict[str, Run]) -> str:
    """A sentence about the sides, as `called` has them."""
    if not _grows(runs):
        return text
    return re.sub(rf"\b({'|'.join(_GROWN)})\b", lambda found: _GROWN[found.group()], text)


def _grows(runs: dict[str, Run]) -> bool:
    return "sparse" in runs and bool(runs["sparse"].get("stages"))
