"""Which recipe to take: every candidate's memory, time and risk, what is refused and why, and the pick for a goal.

The goals: `fit` takes the safest recipe that fits, then the fastest; `speed` the fastest that fits, and a sparse one
only where it is at least 3 % faster than dense; `memory` the leanest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from sparsetrain.core.errors import UnknownFamily
from sparsetrain.planner.machines import MachineRates
from sparsetrain.planner.memory import PeakBytes
from sparsetrain.planner.outline import Outline
from sparsetrain.planner.quality import Risk, risk_of
from sparsetrain.planner.roofline import LENGTHS, WINS, faster_at, step_seconds

GOALS = ("fit", "speed", "memory")
BASELINE = "LoRA"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to train. values: the recipe's keys in which it differs. pickable: False for rows shown to compare.
    rounds: why it is not exact beside its methods; empty where it is. beside: the label of an earlier candidate that it
    is compared with; empty: the first. untimed: what of its time is not known, and not in a row's step."""

    label: str
    values: dict[str, Any]
    pickable: bool = True
    rounds: str = ""
    beside: str = ""
    untimed: str = ""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked. memory_bytes: None asks for no limit. context: the most tokens the model takes, if it says.
    lengths: others at which the peak memory is asked for too."""

    tokens: int
    batch: int = 1
    grad_accum: int = 1
    memory_bytes: int | None = None
    goal: str = "fit"
    dtype: str = "fp32"
    rates: MachineRates
    context: int | None = None
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """A candidate's prediction. refused: why it is not to be taken, or None. fits: within the memory limit.

    longest, largest: the longest sequence at the asked batch and the largest batch at the asked length that fit (0:
    none); None without a limit. faster_at: where its step is faster than that of candidate `than`, as (first, last)
    length of each stretch; None: other lengths were not timed. by_length: (tokens, bytes at the peak) at the
    question's lengths. timed: the measurement that step_s follows from; empty where it is the roofline alone.
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
    faster_at: tuple[tuple[int, int], ...] | None = ()
    than: str = ""
    by_length: tuple[tuple[int, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values |= {"candidate": asdict(self.candidate), "risk": asdict(self.risk)}
        return values | {"peak": None if self.peak is None else asdict(self.peak)}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """rows: every candidate. picked: the recipe to take, or None. reasons: why. nearest: what is possible where nothing
    fits.

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
    speedup: Callable[[Candidate, int], tuple[float, str] | None] = lambda _candidate, _tokens: None,
) -> Answer:
    """Predict every candidate and pick one.

    Args:
        question: the goal and its limits.
        candidates: the first is dense LoRA (or full fine-tuning), which those are compared with that name no other.
        outline_of: traces a candidate; its ValueError is the reason of a refusal.
        methods_of: a candidate's methods, with defaults filled in.
        unable: why the time of an outline's operations is not known on the machine, unless it was measured; or None.
        fit: `seq` or `batch`: pick for the longest sequence or largest batch instead of the goal.
        speedup: (candidate, tokens) -> dense time / its time as measured on the machine, and where; None where it was
            not.
    """
    rows = []
    traced: dict[str, Outline] = {}
    unknown: str | None = None
    for candidate in candidates:
        risk = risk_of(methods_of(candidate))
        if candidate.rounds:
            risk = replace(risk, ratio=None, exact=False, texts=(*risk.texts, candidate.rounds))
        row = Row(candidate=candidate, risk=risk)
        if unknown is not None and candidate.values.get("methods"):  # no method finds its sites: known from the first
            rows.append(replace(row, refused=unknown, fits=False))
            continue
        try:
            found = outline_of(candidate)
        except UnknownFamily as error:
            unknown = f"{_line(error).partition('. ')[0]}, and without a row no method knows the model's parts"
            rows.append(replace(row, refused=unknown, fits=False))
            continue
        except ValueError as error:
            rows.append(replace(row, refused=_line(error), fits=False))
            continue
        except Exception as error:  # an op without a fake form: the other candidates still have their answer
            reason = f"its step cannot be traced ({type(error).__name__}: {_line(error)})"
            rows.append(replace(row, refused=reason, fits=False))
            continue
        measured = partial(speedup, candidate) if traced else lambda _tokens: None
        traced.setdefault(candidate.label, found)
        than = candidate.beside if candidate.beside in traced else next(iter(traced))
        rows.append(_predicted(replace(row, than=than), found, traced[than], question, unable(found), measured))
    if rows and all(row.peak is None for row in rows):
        why = list(dict.fromkeys(str(row.refused) for row in rows))
        raise ValueError(f"no way to train this model can be planned: {'. '.join(why[:2])}.")
    picked, reasons = _pick(rows, question) if fit is None else _pick_largest(rows, fit)
    return Answer(
        question=question,
        rows=tuple(rows),
        picked=picked,
        reasons=tuple(reasons),
        fit=fit,
    )


def _line(error: Exception) -> str:
    """The first line of an error, without the stop that the sentence around it brings."""
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")


def _predicted(
    row: Row,
    found: Outline,
    base: Outline,
    question: Question,
    unable: str | None,
    measured: Callable[[int], tuple[float, str] | None],
) -> Row:
    tokens, batch = question.tokens, question.batch
    accumulates = question.grad_accum > 1

    def roofline(outline: Outline, length: int) -> float:
        shape = {"tokens": length, "batch": batch, "grad_accum": question.grad_accum}
        return step_seconds(outline, question.rates, dtype=question.dtype, **shape)

    def seconds(length: int) -> float:
        """Of a step of this row: what the table says at the asked length is what it is compared by."""
        timed = measured(length)
        return roofline(found, length) if timed is None else roofline(base, length) / timed[0]

    def total(length: int, rows: int) -> float:
        return found.peak(length, rows, accumulates=accumulates).total

    peak = found.peak(tokens, batch, accumulates=accumulates)
    limit = question.memory_bytes
    faster: tuple[tuple[int, int], ...] = ()
    timed = measured(tokens)
    if row.candidate.values.get("methods") and unable is None:
        faster = faster_at(seconds, lambda n: roofline(base, n), sorted({*LENGTHS, tokens}))
    return replace(
        row,
        peak=peak,
        step_s=seconds(tokens),
        how=found.how(tokens, batch),
        timed="" if timed is None else timed[1],
        refused=unable if timed is None else None,
        fits=limit is None or peak.total <= limit,
        longest=None if limit is None else most(lambda n: total(n, batch), limit, unit=64, ceiling=question.context),
        largest=None if limit is None else most(lambda n: total(tokens, n), limit, unit=1, ceiling=None),
        faster_at=faster if unable is None else None,
        by_length=tuple((length, total(length, batch)) for length in question.lengths),
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
        best = min(fitting, key=lambda row: peak_bytes_of(row))
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
        f"{row.candidate.label} would be safer or faster, but needs {peak_bytes_of(row) / 1e9:.1f} GB."
        for row in dropped
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


def peak_bytes_of(row: Row) -> float:
    """Peak memory of a row; infinite where there is none."""
    return row.peak.total if row.peak is not None else float("inf")


def _seconds(row: Row) -> float:
    return row.step_s if row.step_s is not None else float("inf")
