"""Numbers as people read them."""

from __future__ import annotations

import math

_MIB = 1024**2


def bytes_text(value: float | None) -> str:
    """1.50 GiB, 210 MiB, 0.4 MiB, 12 KiB."""
    if value is None:
        return "–"
    if abs(value) >= 1024 * _MIB:
        return f"{value / (1024 * _MIB):.2f} GiB"
    if abs(value) >= 0.1 * _MIB:
        return f"{value / _MIB:.{0 if abs(value) >= 100 * _MIB else 1}f} MiB"
    return f"{value / 1024:.0f} KiB" if value else "0"


def seconds_text(value: float | None) -> str:
    """12 ms, 1.31 s, 143 s, 12.5 min, 2.1 h."""
    if value is None or not math.isfinite(value):
        return "–"
    if value < 0.0995:
        return f"{value * 1000:.3g} ms"
    if value < 600:
        return f"{value:.3g} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def number_text(value: float | None, digits: int = 4) -> str:
    """Loss and perplexity: four figures; "not a number" where a run diverged."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not a number"
    if abs(value) >= 1e15:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - len(str(int(abs(value)))))}f}"


def interval_text(low: float | None, high: float | None, form: str = ".2f") -> str:
    """1.46 to 1.55; "too few pairs" where there is no interval."""
    return "too few pairs" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def joined(words: list[str]) -> str:
    """a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
