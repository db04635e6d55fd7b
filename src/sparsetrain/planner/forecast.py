"""What a way of training needs at one shape on one machine, predicted: peak memory, and seconds of a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from sparsetrain.core.config import plain_values
from sparsetrain.planner.choosing import BASELINE, Option, Speed
from sparsetrain.planner.machines import MachineRates
from sparsetrain.planner.outline import Outline
from sparsetrain.planner.predictor import Predictor
from sparsetrain.planner.roofline import step_seconds
from sparsetrain.planner.search import Candidate, most

MARGIN = 1.05
"""Peaks were predicted within 3.8 % on a CPU and 7.6 % on a GPU, mostly from above."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """tokens: of the longest row. usable_bytes: for tensors; None: not known, and then everything fits."""

    predictor: Predictor
    rates: MachineRates
    tokens: int
    batch: int
    grad_accum: int
    dtype: str
    usable_bytes: float | None

    def outline(self, way: Option) -> Outline | ValueError:
        """The way's outline, or why there is none."""
        try:
            return self.predictor.outline(_candidate(way))
        except ValueError as error:
            return error
        except Exception as error:  # a model that can't be traced may still be trained
            return ValueError(f"it can't be traced: {type(error).__name__}: {error}")

    def parameters(self, dense: Option) -> int | None:
        """Parameters of the model; None where it can't be traced."""
        found = self.outline(dense)
        return None if isinstance(found, ValueError) else found.parameters

    def prepare(self, ways: Iterable[Option]) -> None:
        """Trace several ways at once."""
        self.predictor.prepare([_candidate(way) for way in ways])

    def weighed(self, way: Option) -> Option:
        """The way with its peak, and whether it fits; one with methods that can't be traced is refused."""
        found = self.outline(way)
        if isinstance(found, ValueError):
            refused = str(found).splitlines()[0] if way.methods or way.pieces > 1 else None
            return replace(way, refused=way.refused or refused)
        peak = self._peak(found, self.tokens)
        return replace(way, peak_bytes=peak, fits=self.usable_bytes is None or peak * MARGIN <= self.usable_bytes)

    def seconds(self, way: Option) -> float | None:
        """Seconds of an optimizer step, optimistic; None where the way can't be traced."""
        found = self.outline(way)
        if isinstance(found, ValueError):
            return None
        shape = {"tokens": self.tokens, "batch": self.batch, "grad_accum": self.grad_accum, "dtype": self.dtype}
        return step_seconds(found, self.rates, **shape)

    def speed(self, way: Option, base: Option) -> Speed | None:
        """The way's speed beside another's; None where one of them can't be traced."""
        if way == base:
            return BASELINE
        ours, theirs = self.seconds(way), self.seconds(base)
        if ours is None or theirs is None:
            return None
        return Speed(median=theirs / ours, low=theirs / ours, high=theirs / ours, how="predicted")

    def longest(self, way: Option) -> int:
        """The most tokens of a row, in 64s, at which the way fits; 0: none."""
        found = self.outline(way)
        if isinstance(found, ValueError) or self.usable_bytes is None:
            return 0
        return most(lambda n: self._peak(found, n) * MARGIN, self.usable_bytes, unit=64, ceiling=self.tokens)

    def _peak(self, outline: Outline, tokens: int) -> float:
        return outline.peak(tokens, self.batch, accumulates=self.grad_accum > 1).total


def _candidate(way: Option) -> Candidate:
    return Candidate(label=way.label, values={"methods": [plain_values(c) for c in way.methods], **way.exact})
