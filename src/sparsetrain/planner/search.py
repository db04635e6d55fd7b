"""Which recipe to take: every candidate's memory, time and risk, what is refused and why, and the pick for a goal.

The goals: `fit` takes the safest recipe that fits, then the fastest; `speed` the fastest that fits, and a sparse one
only where it is at least 3 % faster than dense; `memory` the leanest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from sparsetrain.planner.machines import MachineRates
from sparsetrain.planner.memory import PeakBytes
from sparsetrain.planner.outline import Outline
from sparsetrain.planner.quality import Risk, risk_of
from sparsetrain.planner.roofline import WINS, break_even, step_seconds

GOALS = ("fit", "speed", "memory")
BASELINE = "LoRA"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to train. values: the recipe's keys in which it differs. pickable: False for rows shown to compare."""

    label: str
    values: dict[str, Any]
    pickable: bool = True


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked. memory_bytes: None asks for no limit. context: the most tokens the model takes, if it says."""

    tokens: int
    batch: int = 1
    grad_accum: int = 1
    memory_bytes: int | None = None
    goal: str = "fit"
    dtype: str = "fp32"
    rates: MachineRates
    context: int | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """A candidate's prediction. refused: why it is not to be taken, or None. fits: within the memory limit.

    longest, largest: the longest sequence at the asked batch and the largest batch at the asked length that fit (0:
    none); None without a limit. break_even: the length from which its step is faster than dense LoRA's.
    timed: the measurement that step_s follows from; empty where it is the roofline alone.
    """

    candidate: Candidate
    risk: Risk
    peak: PeakBytes | None = None
    step_s: float | None = None
    how: str = ""
    timed: str = ""
    refused: str | None = None
    fits: bool = True
    longest: int | None = None
    largest: int | None = None
    break_even: int | None = None

    def to_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values |= {"candidate": asdict(self.candidate), "risk": asdict(self.risk)}
        return values | {"peak": None if self.peak is None else asdict(self.peak)}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """rows: every candidate. picked: the recipe to take, or None. reasons: why; `nearest` when nothing fits.

    fit: `seq` or `batch` where the longest sequence or largest batch was asked for.
    """

    question: Question
    rows: tuple[Row, ...]
    picked: Row | None
    reasons: tuple[str, ...]
    nearest: tuple[str, ...] = ()
    fit: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens, batch) that the picked recipe is to be trained at."""
        tokens, batch = self.question.tokens, self.question.batch
        if self.picked is not None and self.fit == "seq":
            tokens = self.picked.longest or tokens
        if self.picked is not None and self.fit == "batch":
            batch = self.picked.largest or batch
        return tokens, batch

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "question": asdict(self.question),
            "rows": [row.to_dict() for row in self.rows],
            "picked": None if self.picked is None else self.picked.candidate.label,
            "reasons": list(self.reasons),
            "nearest": list(self.nearest),
            "refused": {row.candidate.label: row.refused for row in self.rows if row.refused},
        }


def answer(
    question: Question,
    candidates: list[Candidate],
    outline_of: Callable[[Candidate], Outline],
    methods_of: Callable[[Candidate], list[dict[str, Any]]],
    unable: Callable[[Outline], str | None],
    fit: str | None = None,
    speedup: Callable[[Candidate], tuple[float, str] | None] = lambda _candidate: None,
) -> Answer:
    """Predict every candidate and pick one.

    Args:
        question: the goal and its limits.
        candidates: the first is dense LoRA (or full fine-tuning), which break-even compares with.
        outline_of: traces a candidate; its ValueError is the reason of a refusal.
        methods_of: a candidate's methods, with defaults filled in.
        unable: why an outline's operations cannot run well on the machine, or None.
        fit: `seq` or `batch`: pick for the longest sequence or largest batch instead of the goal.
        speedup: dense time / a candidate's time as measured on the machine, and where; None where it was not.
    """
    rows = []
    base: Outline | None = None
    for candidate in candidates:
        row = Row(candidate=candidate, risk=risk_of(methods_of(candidate)))
        try:
            found = outline_of(candidate)
        except ValueError as error:
            rows.append(replace(row, refused=_line(error), fits=False))
            continue
        except Exception as error:  # an op without a fake form: the other candidates still have their answer
            reason = f"its step cannot be traced ({type(error).__name__}: {_line(error)})"
            rows.append(replace(row, refused=reason, fits=False))
            continue
        base = found if base is None else base
        predicted = _predicted(row, found, base, question, unable(found))
        if (measured := speedup(candidate)) is not None and rows:
            ratio, timed = measured
            predicted = replace(predicted, step_s=(rows[0].step_s or 0.0) / ratio, timed=timed)
        rows.append(predicted)
    if rows and all(row.peak is None for row in rows):
        why = list(dict.fromkeys(str(row.refused) for row in rows))
        raise ValueError(f"no way to train this model can be planned: {'. '.join(why[:2])}.")
    picked, reasons = _pick(rows, question) if fit is None else _pick_largest(rows, fit)
    return Answer(
        question=question,
        rows=tuple(rows),
        picked=picked,
        reasons=tuple(reasons),
        nearest=() if picked is not None else tuple(_nearest(rows, question)),
        fit=fit,
    )


def _line(error: Exception) -> str:
    """The first line of an error, without the stop that the sentence around it brings."""
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")


def _predicted(row: Row, found: Outline, base: Outline, question: Question, unable: str | None) -> Row:
    rates, tokens, batch = question.rates, question.tokens, question.batch
    accumulates = question.grad_accum > 1
    dtype = question.dtype

    def seconds(outline: Outline, length: int) -> float:
        return step_seconds(outline, rates, tokens=length, batch=batch, grad_accum=question.grad_accum, dtype=dtype)

    def total(length: int, rows: int) -> float:
        return found.peak(length, rows, accumulates=accumulates).total

    peak = found.peak(tokens, batch, accumulates=accumulates)
    limit = question.memory_bytes
    even = None
    if row.candidate.values.get("methods") and unable is None:
        even = break_even(lambda n: seconds(found, n), lambda n: seconds(base, n))
    return replace(
        row,
        peak=peak,
        step_s=seconds(found, tokens),
        how=found.how(tokens, batch),
        refused=unable,
        fits=limit is None or peak.total <= limit,
        longest=None if limit is None else most(lambda n: total(n, batch), limit, unit=64, ceiling=question.context),
        largest=None if limit is None else most(lambda n: total(tokens, n), limit, unit=1, ceiling=None),
        break_even=even,
    )


def most(size: Callable[[int], float], limit: float, *, unit: int, ceiling: int | None) -> int:
    """The largest multiple of `unit`, at most `ceiling` (or 16 M), whose size is within the limit; 0 if none is."""
    high = (ceiling or 2**24) // unit
    if high and size(high * unit) <= limit:
        return high * unit
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle * unit) <= limit else (low, middle)
    return low * unit


def _pick(rows: list[Row], question: Question) -> tuple[Row | None, list[str]]:
    able = [row for row in rows if row.refused is None and row.candidate.pickable and row.peak is not None]
    fitting = [row for row in able if row.fits]
    if not fitting:
        return None, []
    if question.goal == "memory":
        best = min(fitting, key=lambda row: _peak(row))
        return best, [f"{best.candidate.label} needs the least memory of {len(fitting)} that fit."]
    if question.goal == "speed":
        exact = [row for row in fitting if row.risk.exact]
        best = min(fitting, key=_seconds)
        safe = min(exact, key=_seconds) if exact else None
        if safe is not None and _seconds(best) >= WINS * _seconds(safe):
            return safe, [f"{safe.candidate.label} is exact, and no sparse recipe is 3 % faster at this shape."]
        than = f", {_seconds(safe) / _seconds(best):.2f}x {safe.candidate.label}" if safe else ""
        return best, [f"{best.candidate.label} is the fastest that fits{than}."]
    best = min(fitting, key=lambda row: (row.risk.order, _seconds(row)))
    reasons = [f"{best.candidate.label} is the safest that fits, and the fastest of those."]
    dropped = [
        row for row in able if not row.fits and (row.risk.order, _seconds(row)) < (best.risk.order, _seconds(best))
    ]
    reasons += [
        f"{row.candidate.label} would be safer or faster, but needs {_peak(row) / 1e9:.1f} GB." for row in dropped
    ]
    return best, reasons


def _pick_largest(rows: list[Row], fit: str) -> tuple[Row | None, list[str]]:
    """The recipe that takes the longest sequence or largest batch; the safest of those within 1 % of it."""

    def reach(row: Row) -> int:
        return (row.longest if fit == "seq" else row.largest) or 0

    able = [row for row in rows if row.refused is None and row.candidate.pickable and reach(row)]
    if not able:
        return None, []
    furthest = max(map(reach, able))
    best = min((row for row in able if reach(row) >= 0.99 * furthest), key=lambda row: (row.risk.order, _seconds(row)))
    reasons = [f"{best.candidate.label} goes furthest: {reach(best):,}."]
    exact = [row for row in able if row.risk.exact]
    if exact and not best.risk.exact:
        safe = max(exact, key=reach)
        reasons.append(f"Without loss of quality: {reach(safe):,}, with {safe.candidate.label}.")
    return best, reasons


def _nearest(rows: list[Row], question: Question) -> list[str]:
    """What comes closest to an impossible goal: a shorter sequence, a smaller batch, more memory."""
    able = [row for row in rows if row.refused is None and row.candidate.pickable and row.peak is not None]
    if not able:
        return ["No recipe can run on this model."]
    limit = question.memory_bytes or 0
    lines = []
    longest = max(able, key=lambda row: (row.longest or 0, -_order(row)))
    exact = [row for row in able if row.risk.exact and row.longest]
    if longest.longest:
        lines.append(f"{longest.longest:,} tokens at batch {question.batch}, with {longest.candidate.label}.")
        if exact and not longest.risk.exact:
            safe = max(exact, key=lambda row: row.longest or 0)
            lines.append(f"{safe.longest:,} tokens without loss of quality, with {safe.candidate.label}.")
    else:
        least = min(able, key=lambda row: row.peak.parameters + row.peak.optimizer if row.peak else 0)
        assert least.peak is not None
        lines.append(
            f"no length: the weights alone take {least.peak.parameters / 1e9:.1f} GB of {limit / 1e9:.1f}. "
            "Take a smaller model or more memory."
        )
    larger = max(able, key=lambda row: row.largest or 0)
    if larger.largest:
        lines.append(f"batch {larger.largest} at {question.tokens:,} tokens, with {larger.candidate.label}.")
    lean = min(able, key=_peak)
    lines.append(f"{_peak(lean) / 1e9:.1f} GB for what was asked, with {lean.candidate.label}.")
    return lines


def _order(row: Row) -> float:
    kind, ratio, count = row.risk.order
    return 100 * kind + ratio + count / 1000


def _peak(row: Row) -> float:
    return row.peak.total if row.peak is not None else float("inf")


def _seconds(row: Row) -> float:
    return row.step_s if row.step_s is not None else float("inf")
