"""Weighing the ways to train: from what is on record to what fits this memory, and how fast each is thought to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sparsetrain.core.config import MethodConfig
from sparsetrain.core.units import bytes_text
from sparsetrain.planner.choosing import BASELINE, Asked, Option, Speed, able, checkpointed, leaner, options
from sparsetrain.planner.forecast import Forecast
from sparsetrain.planner.quality import Deployed, Facts


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Tokens of each training row, and the share of targets among them; None where a row has one label."""

    lengths: Sequence[int]
    target_share: float | None

    def known(self, facts: Facts) -> Facts:
        """The facts with those of the rows; `seq_len` is the length of the row that the average token is in."""
        mean = sum(n * n for n in self.lengths) / sum(self.lengths)
        return replace(facts, seq_len=mean, target_share=self.target_share)


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """facts, forecast: as the rows have them, if they were read."""

    facts: Facts
    forecast: Forecast
    ways: list[Option]


Measure = Callable[[list[Option], Option], tuple[dict[str, Speed], dict[str, str]]]
"""(ways, the first of which is the baseline; the baseline) -> label -> its speed, label -> why it cannot be taken."""


def weigh(
    records: Sequence[Deployed],
    facts: Facts,
    forecast: Forecast,
    asked: Asked,
    *,
    recomputes: bool,
    read_rows: Callable[[], Rows],
    check: Callable[[tuple[MethodConfig, ...]], None],
) -> Weighed:
    """Every way, refused or with its peak memory. Rows are read if it depends on them.

    Args:
        recomputes: the recipe asks for checkpointing.
        check: raises ValueError if methods cannot do what the recipe asks of them.
    """
    dense = Option(trained=facts.trained, recomputes=recomputes)
    facts = replace(facts, parameters=forecast.parameters(dense))
    maybe = able(options(records, facts, asked, recomputes=recomputes, final=False))
    if len(maybe) > 1 or not forecast.weighed(dense).fits:
        rows = read_rows()
        facts, forecast = rows.known(facts), replace(forecast, tokens=min(forecast.tokens, max(rows.lengths)))
    found = options(records, facts, asked, recomputes=recomputes)
    found = [way if way.refused is not None else _checked(way, check) for way in found]
    forecast.prepare(able(found))
    found = [way if way.refused is not None else forecast.weighed(way) for way in found]
    found += [forecast.weighed(way) for way in checkpointed(found, asked.goal)]
    found += [forecast.weighed(way) for way in leaner(found, gpu=forecast.predictor.gpu)]
    return Weighed(facts=facts, forecast=forecast, ways=found)


def _checked(way: Option, check: Callable[[tuple[MethodConfig, ...]], None]) -> Option:
    try:
        if way.methods:
            check(way.methods)
    except ValueError as error:
        return replace(way, refused=str(error).splitlines()[0])
    return way


def with_speeds(weighed: Weighed, measure: Measure) -> list[Option]:
    """The ways with their speeds beside the first dense way that fits: measured where it matters, else the recorded one
    of this kind of data, or where that holds for no such step or for no GPU, predicted."""
    ways, forecast = able(weighed.ways), weighed.forecast
    base = next(way for way in [*ways, *weighed.ways] if not way.methods)
    if ways == [base]:
        return [replace(way, speed=BASELINE) if way == base else way for way in weighed.ways]
    speeds = {way.label: _unmeasured(way, base, forecast) for way in ways}
    failed: dict[str, str] = {}
    if base in ways and any(way.methods for way in ways):
        measured, failed = measure([base, *(way for way in ways if way != base)], base)
        speeds |= measured
    return [
        replace(way, speed=speeds.get(way.label), refused=failed.get(way.label)) if way in ways else way
        for way in weighed.ways
    ]


def _unmeasured(way: Option, base: Option, forecast: Forecast) -> Speed | None:
    """The least on record, which is of CPUs and without checkpointing; else predicted."""
    found = [record.speedup for record in way.records]
    if found and None not in found and not (way.exact or base.exact or forecast.predictor.gpu):
        least = min(filter(None, found))
        return Speed(median=least, low=least, high=least, how="recorded")
    return forecast.speed(way, base)


def nothing_fits(weighed: Weighed, asked: Asked) -> str:
    """The error where no way fits: what was asked, what comes nearest, and what to do."""
    forecast = weighed.forecast
    able = [way for way in weighed.ways if way.refused is None and way.peak_bytes is not None]
    lean = min(able, key=lambda way: way.peak_bytes or 0.0)
    said = "of memory that are free" if asked.memory_bytes is None else "of --memory, after what the libraries take"
    text = (
        f"no way to train fits in {bytes_text(forecast.usable_bytes)} {said}: the leanest, {lean.label}, needs "
        f"{bytes_text(lean.peak_bytes)} for {forecast.batch} x {forecast.tokens:,} tokens."
    )
    lower = "lower batch_size, " if forecast.batch > 1 else ""
    if longest := forecast.longest(lean):
        return f"{text} Nearest: seq_len={longest} fits with it. Or {lower}take a smaller model or more memory."
    return f"{text} No length fits: {lower}take a smaller model or more memory."
