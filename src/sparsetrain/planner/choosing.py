"""Which way of training pays here: what `--preset auto` weighs, and its rules. Pure; measuring is `hf.study.choose`'s.

1. A way with methods comes from a record of it, deployed dense (`quality`), and only where its facts hold.
2. It is admitted if it was within the tolerance of dense LoRA after as many steps: a run has the steps that it is asked
   for, so a lead after as much time is none of its user's. And it was faster there, or leaner.
3. It has to fit. Of what does, `time` takes the fastest, `memory` the leanest whose step takes at most 1.5 times as
   long as the fastest. Dense training is always weighed, and wins a tie.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sparsetrain.core.config import MethodConfig, plain_values
from sparsetrain.core.units import bytes_text
from sparsetrain.measure.timing import MARGIN
from sparsetrain.planner.quality import Deployed, Facts
from sparsetrain.recipes.entries import short_entry
from sparsetrain.recipes.presets import PIECES

GOALS = ("time", "memory")
SLOWEST = 1.5
"""With goal=memory: a step may take this many times the fastest one's."""
GAIN = 1.05
"""Of a record that isn't leaner, the step has to be so many times as fast to be worth timing here."""
ROUGH = 1.1
"""A speed-up that isn't measured here has to be above this: predicted steps are 7 to 28 % too short, and a recorded one
is another machine's."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a choice is asked for.

    memory_bytes: what training may use; None: what is free.
    tolerance: perplexity that may be lost at equal steps, as a share. goal: of `GOALS`.
    seconds: most of the time that timing may take. again: time again what is in the cache.
    """

    memory_bytes: int | None = None
    tolerance: float = 0.01
    goal: str = "time"
    seconds: float = 30.0
    again: bool = False


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Step of the baseline / step of a way, between low and high.

    how: `measured` here, `recorded` elsewhere, `predicted` from the machine's rates, or `baseline`.
    """

    median: float
    low: float
    high: float
    how: str

    @property
    def wins(self) -> bool:
        """Faster than the baseline beyond a tie, by the rule of `measure.timing`; where it isn't measured, by far."""
        return self.low > 1 and self.median > (1 + MARGIN if self.how == "measured" else ROUGH)


BASELINE = Speed(median=1.0, low=1.0, high=1.0, how="baseline")


@dataclass(frozen=True, kw_only=True)
class Option:
    """One way to train. refused: why it is not to be taken, whatever its speed; fits: in memory, as far as is known.

    recomputes, offloads, pieces: the exact tools, as a recipe's gradient_checkpointing, activation_offloading and
        tiled_mlp have them.
    records: what admits it; none for dense training.
    """

    methods: tuple[MethodConfig, ...] = ()
    recomputes: bool = False
    offloads: bool = False
    pieces: int = 1
    trained: str = "lora"
    records: tuple[Deployed, ...] = ()
    refused: str | None = None
    peak_bytes: float | None = None
    fits: bool = True
    speed: Speed | None = None
    reason: str = ""

    @property
    def label(self) -> str:
        train = "LoRA" if self.trained == "lora" else self.trained
        way = " + ".join(map(_written, self.methods)) or f"dense {train}"
        tools = {"checkpointing": self.recomputes, "offload": self.offloads, "tiled MLP": self.pieces > 1}
        return " + ".join([way, *(tool for tool, used in tools.items() if used)])

    @property
    def exact(self) -> dict[str, Any]:
        """The recipe's keys of the exact tools that are used."""
        found: dict[str, Any] = {"gradient_checkpointing": "non-reentrant"} if self.recomputes else {}
        found |= {"activation_offloading": True} if self.offloads else {}
        return found | ({"tiled_mlp": self.pieces} if self.pieces > 1 else {})

    @property
    def lost(self) -> float:
        """Perplexity lost at equal steps, the most on record; infinite where it isn't."""
        return max((r.equal_steps if r.equal_steps is not None else float("inf") for r in self.records), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "label": self.label,
            "methods": [plain_values(config) for config in self.methods],
            "recomputes": self.recomputes,
            "offloads": self.offloads,
            "pieces": self.pieces,
            "refused": self.refused,
            "fits": self.fits,
            "peak_bytes": self.peak_bytes,
            "speedup": None if self.speed is None else vars(self.speed),
            "reason": self.reason,
            "evidence": [f"{record.text} [{record.source}]" for record in self.records],
        }


def _written(config: MethodConfig) -> str:
    method, *rest = short_entry(config).items()
    return f"{method[1]}:{','.join(f'{key}={value}' for key, value in rest)}" if rest else config.method


def options(
    records: Iterable[Deployed], facts: Facts, asked: Asked, *, recomputes: bool = False, final: bool = True
) -> list[Option]:
    """Dense training, then every way on record, refused where the facts or the tolerance do not admit it.

    Args:
        recomputes: the recipe asks for checkpointing, in whatever way.
        final: facts that aren't known refuse too; else they may be learnt yet.
    """
    ways: dict[tuple[MethodConfig, ...], list[Deployed]] = {}
    for record in records:
        ways.setdefault(record.methods, []).append(record)
    found = [Option(trained=facts.trained, recomputes=recomputes)]
    for methods, recorded in ways.items():
        here = tuple(record for record in recorded if not record.outside(facts, final))
        way = Option(methods=methods, trained=facts.trained, recomputes=recomputes, records=here)
        if not here:
            why = min((record.outside(facts, final) for record in recorded), key=len)
            found.append(replace(way, refused=f"no evidence for {why[0]}"))
            continue
        found.append(replace(way, refused=next(filter(None, (_beyond(r, asked.tolerance) for r in here)), None)))
    return found


def _beyond(record: Deployed, tolerance: float) -> str | None:
    """Why a record doesn't admit its methods; None if it does."""
    if record.speedup is not None and record.speedup < GAIN and (record.peak or 0.0) >= 1:
        return f"on record it gains nothing: a step {record.speedup:.2f}x dense, {record.peak:.2f}x its peak memory"
    if record.equal_steps is not None and record.equal_steps <= tolerance:
        return None
    ahead = record.equal_time is not None and record.equal_time < 0
    more = f"; it is ahead with {record.speedup or 1:.2g} times the steps (--tolerance allows it)" if ahead else ""
    return f"{_quality(record)}, and {tolerance * 100:.3g} % is tolerated{more}"


def _quality(record: Deployed) -> str:
    """'2.5 % above dense LoRA's perplexity at equal steps, 11 % below at equal time (1 seed)'"""
    found = [
        f"{abs(value) * 100:.2g} % {'above' if value > 0 else 'below'} dense LoRA at equal {what}"
        for what, value in (("steps", record.equal_steps), ("time", record.equal_time))
        if value is not None
    ]
    return f"{', '.join(found)} ({record.seeds_text})"


def untried(records: Iterable[Deployed], facts: Facts, asked: Asked) -> str | None:
    """What to try beside dense training where nothing but the model's size is beyond the records; None: nothing is.

    Of the ways within the tolerance the one whose step is the fastest beside dense LoRA's, on record.
    """
    near = [
        record
        for record in records
        if [why.partition(" ")[0] for why in record.outside(facts, final=False)] == ["parameters"]
        and _beyond(record, asked.tolerance) is None
    ]
    if not near:
        return None
    best = max(near, key=lambda record: record.speedup or 0.0)
    ways = " ".join(f"--method {_written(config)}" for config in best.methods)
    return (
        f"Nothing is on record for models of this size; on smaller or larger ones a step was {best.speedup or 1:.2g} "
        f"times as fast, {_quality(best)}. To see it here: {ways} --compare dense"
    )


def checkpointed(found: Iterable[Option], goal: str) -> list[Option]:
    """The ways that are also to be weighed with checkpointing: those that do not fit, or all if memory is the goal."""
    return [
        replace(way, recomputes=True, peak_bytes=None, fits=True)
        for way in found
        if way.refused is None and not way.recomputes and (goal == "memory" or not way.fits)
    ]


def leaner(found: Iterable[Option], *, gpu: bool) -> list[Option]:
    """Dense training with every exact tool, where none of the ways fits."""
    ways = list(found)
    dense = [way for way in ways if way.recomputes and not way.methods and way.refused is None and way.pieces == 1]
    if able(ways) or not dense:
        return []
    bare = replace(dense[0], peak_bytes=None, fits=True, pieces=PIECES)
    return [bare, replace(bare, offloads=True)] if gpu and not bare.offloads else [bare]


def able(found: Iterable[Option]) -> list[Option]:
    """The ways that may be taken, as far as is known."""
    return [way for way in found if way.refused is None and way.fits]


def pick(found: list[Option], asked: Asked) -> tuple[Option | None, list[Option]]:
    """The way to take, None if nothing fits, and all with the reason why they are taken or not.

    Args:
        found: with speeds beside the first dense way that fits.
    """
    left = able(found)
    if not left:
        return None, found
    best = (_leanest if asked.goal == "memory" else _fastest)(left)
    return replace(best, reason=_why(best, asked)), [
        replace(way, reason=_why(way, asked) if way is best else way.refused or _why_not(way, best)) for way in found
    ]


def _fastest(left: list[Option]) -> Option:
    dense = [way for way in left if not way.methods]
    wins = [way for way in left if way.methods and (not dense or (way.speed is not None and way.speed.wins))]
    if not wins:
        return max(dense, key=_median)
    best = max(map(_median, wins))
    return min((way for way in wins if _median(way) * (1 + MARGIN) >= best), key=lambda way: (way.lost, -_median(way)))


def _leanest(left: list[Option]) -> Option:
    quick = [way for way in left if _median(way) * SLOWEST >= max(map(_median, left))]
    least = min(map(_peak, quick))
    return max(
        (way for way in quick if _peak(way) <= least * (1 + MARGIN)), key=lambda way: (not way.methods, _median(way))
    )


def _median(way: Option) -> float:
    return way.speed.median if way.speed is not None else 0.0


def _peak(way: Option) -> float:
    return way.peak_bytes if way.peak_bytes is not None else float("inf")


def _speed(way: Option) -> str:
    return "not timed" if way.speed is None else f"{way.speed.median:.2f}x dense ({way.speed.how})"


def _why(way: Option, asked: Asked) -> str:
    goal = "the fastest" if asked.goal == "time" else f"the leanest within {SLOWEST} times the fastest step"
    return "; ".join([f"{goal} that fits", *(f"on record {_quality(record)}" for record in way.records)])


def _why_not(way: Option, best: Option) -> str:
    if not way.fits:
        return "does not fit"
    if way.methods and not best.methods and not (way.speed is not None and way.speed.wins):
        return "no faster than dense here"
    return "slower" if _median(way) <= _median(best) else "a tie in speed, or needs more memory"


def settled(speeds: Mapping[str, Speed]) -> bool:
    """Whether more rounds would change nothing: each way is faster or slower beyond doubt, and so is the fastest."""
    others = [speed for speed in speeds.values() if speed.how != "baseline"]
    clear = [speed for speed in others if speed.wins or speed.high < 1]
    first, *rest = sorted(others, key=lambda speed: -speed.median)
    return len(clear) == len(others) and (not rest or rest[0].high < first.low or not first.wins)


def table(found: list[Option], chosen: Option | None) -> list[str]:
    """What was weighed, a line each; ways of the same methods that are refused for the same reason share one."""
    lines: list[str] = []
    refused: dict[tuple[str, str], list[Option]] = {}
    for way in found:
        if way.refused is not None:
            refused.setdefault((" + ".join(config.method for config in way.methods), way.refused), []).append(way)
            continue
        figures = "" if way.speed is None or way.speed is BASELINE else f"{_speed(way)}, "
        mark = "* " if chosen is not None and way.label == chosen.label else "  "
        lines.append(f"{mark}{way.label}: {figures}{bytes_text(way.peak_bytes)}; {way.reason}")
    for (names, why), ways in refused.items():
        lines.append(f"  {ways[0].label if len(ways) == 1 and len(names) < 20 else names}: {why}")
    return lines
