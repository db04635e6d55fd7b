"""How numbers are written, for all tables."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable


def spread(values: list[float]) -> str:
    """Mean ± standard error."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{error}"


def signed(values: list[float]) -> str:
    """Mean ± standard error of differences, with the sign."""
    text = spread(values)
    return text if text.startswith("-") else f"+{text}"


def judged(differences: list[float], less_is_better: bool) -> str:
    """ "a tie" if the mean is within its standard error of 0."""
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    if abs(mean) <= error:
        return "a tie"
    return "a win" if (mean < 0) == less_is_better else "a loss"


def judged_share(share: float) -> str:
    """Of bytes, ours / dense: within 5 % is a tie."""
    return "a win" if share < 0.95 else "a loss" if share > 1.05 else "a tie"


def tally(verdicts: Iterable[str]) -> str:
    """ "4 wins, 1 tie, 1 loss"."""
    count = Counter(verdicts)
    names = {"win": "wins", "tie": "ties", "loss": "losses"}
    parts = [f"{count[one]} {one if count[one] == 1 else many}" for one, many in names.items() if count[one]]
    return ", ".join(parts)


def listed(parts: list[str]) -> str:
    """ "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
