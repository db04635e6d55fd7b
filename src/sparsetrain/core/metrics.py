"""The table of qualities: what a number on held-out rows is called, which way is better, and how it is shown.

To add one, add a row, or call `register_metric` from a package that brings a task of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from sparsetrain.core.units import number_text

TIE_LOSS = 0.01
"""Nats within which two losses are a tie: 1 % of perplexity."""
TIE_ACCURACY = 0.005


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One quality.

    name: as results and reports spell it.
    more_is_better: the direction.
    is_share: it lies in [0, 1] and is shown in per cent; a tie is then absolute, and else a share of the dense value.
    tie: a difference up to this is called a tie.
    of_loss: mean held-out loss -> the value, where it follows from the loss; None: it is counted row by row.
    """

    name: str
    more_is_better: bool = False
    is_share: bool = False
    tie: float = 0.0
    of_loss: Callable[[float], float] | None = None

    @property
    def title(self) -> str:
        """The name as a heading."""
        return self.name.replace("_", " ").capitalize()

    def text(self, value: float | None) -> str:
        """The value as a reader wants it."""
        if self.is_share and value is not None and math.isfinite(value):
            return f"{value:.1%}"
        most = math.inf if self.of_loss is None else self.of_loss(math.inf)
        over = "over " if value is not None and math.isfinite(most) and value >= most else ""
        return over + number_text(value)

    def margin(self, dense: float) -> float:
        """The largest difference from the dense value that is a tie."""
        return self.tie if self.is_share else self.tie * abs(dense)


def perplexity(loss: float) -> float:
    """exp(loss), up to e^709: a float ends there, and the loss itself says more."""
    return math.exp(min(loss, 709.0))


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(name="accuracy", more_is_better=True, is_share=True, tie=TIE_ACCURACY),
        Metric(name="perplexity", tie=math.exp(TIE_LOSS) - 1, of_loss=perplexity),
        Metric(name="noise_loss", tie=0.01, of_loss=lambda loss: loss),
    )
}


def register_metric(metric: Metric) -> None:
    """Add a quality to the table; an equal one again does nothing.

    Raises:
        ValueError: the name is taken by another.
    """
    if METRICS.setdefault(metric.name, metric) != metric:
        raise ValueError(f"a metric {metric.name!r} is in the table already. Give yours another name.")
