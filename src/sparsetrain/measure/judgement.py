"""One quantity judged: two values, and an interval or a margin that says whether they can be told apart."""

from __future__ import annotations

import math

from sparsetrain.measure.schema import Judgement


def judgement(
    quantity: str,
    unit: str,
    dense: float,
    sparse: float,
    text: str,
    *,
    margin: float = 0.0,
    interval: tuple[float, float] | None = None,
    more_is_better: bool = False,
) -> Judgement:
    """Who won one quantity, as `schema.Judgement`.

    Args:
        dense, sparse: their values; one that is not a number loses to one that is.
        text: a sentence with the numbers.
        margin: without an interval, a difference up to this is a tie.
        interval: of sparse - dense; a tie if it holds 0.
    """
    finite = {"dense": math.isfinite(dense), "sparse": math.isfinite(sparse)}
    if not all(finite.values()):
        winner = next((side for side, good in finite.items() if good), "unknown")
    elif abs(sparse - dense) <= margin if interval is None else interval[0] <= 0 <= interval[1]:
        winner = "tie"
    else:
        winner = "sparse" if (sparse > dense) == more_is_better else "dense"
    ratio = sparse / dense if all(finite.values()) and dense else None
    found: Judgement = {
        "quantity": quantity,
        "unit": unit,
        "dense": dense if finite["dense"] else None,
        "sparse": sparse if finite["sparse"] else None,
        "ratio": ratio,
        "winner": winner,  # type: ignore[typeddict-item]
        "text": text,
    }
    if interval is not None:
        found["low"], found["high"] = interval
    return found
