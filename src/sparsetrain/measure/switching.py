"""When to go on from a small model to the large one: predicted from the beginnings of both loss curves.

Held-out loss falls with the FLOPs C that are spent on a model as a + b C^-c (arXiv 2001.08361, section 4). A run that
trains the small model down to a loss, and the large one from there as if it had come to that loss by itself, spends
least where both curves are equally steep at that loss: before it the small model gains more for a FLOP, after it the
large one. What a switch itself costs in loss, and what a falling learning rate gains, is not in this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

FLOORS, PLACES = 100, 4000
"""Values of a that a round of a fit tries; losses at which a switch is tried."""


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """loss = floor + scale · FLOPs^-exponent. error: root mean square over the points it is fitted to, in nats."""

    floor: float
    scale: float
    exponent: float
    error: float = 0.0

    def loss(self, flops: float) -> float:
        return self.floor + self.scale * flops**-self.exponent

    def flops(self, loss: float) -> float:
        """Infinite for a loss that the curve does not come to."""
        return (self.scale / (loss - self.floor)) ** (1 / self.exponent) if loss > self.floor else math.inf


@dataclass(frozen=True, kw_only=True)
class Switch:
    """Where a run by way of a small model should go on to the large one.

    loss: held-out, of the small model when it is left. small_flops: spent on it until then.
    flops_ratio: FLOPs of both models to the ordinary run's final loss, over the ordinary run's. target: that loss.
    """

    loss: float
    small_flops: float
    flops_ratio: float
    target: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fitted(flops: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """The power law nearest to the points of a run; each at more than 0 FLOPs.

    Raises:
        ValueError: fewer than four points, or a loss that does not fall.
    """
    if len(flops) < 4 or not losses[-1] < losses[0]:
        raise ValueError(
            f"{len(flops)} held-out losses from {losses[0]:.3f} to {losses[-1]:.3f} give no curve: it takes four "
            "that fall. Let the short runs take more steps."
        )
    low, high, best = 0.0, min(losses), _with_floor(0.0, flops, losses)
    for _ in range(3):  # each time more finely, about the best
        width = (high - low) / FLOORS
        laws = [_with_floor(low + width * place, flops, losses) for place in range(FLOORS)]
        best = min((best, *laws), key=lambda law: law.error)
        low, high = max(0.0, best.floor - width), min(best.floor + width, min(losses))
    return best


def _with_floor(floor: float, flops: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """By a straight line through the logarithms; of infinite error where it does not fall."""
    x, y = [math.log(spent) for spent in flops], [math.log(loss - floor) for loss in losses]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    if slope >= 0:
        return PowerLaw(floor=floor, scale=1.0, exponent=1.0, error=math.inf)
    law = PowerLaw(floor=floor, scale=math.exp(mean_y - slope * mean_x), exponent=-slope)
    squares = [(law.loss(spent) - loss) ** 2 for spent, loss in zip(flops, losses, strict=True)]
    return PowerLaw(floor=floor, scale=law.scale, exponent=law.exponent, error=math.sqrt(sum(squares) / len(squares)))


def best_switch(small: PowerLaw, large: PowerLaw, total_flops: float) -> Switch:
    """The switch that comes to the ordinary run's final loss for the fewest FLOPs; none (small_flops 0) if none saves.

    Args:
        total_flops: of the ordinary run, all on the large model.
    """
    target = large.loss(total_flops)
    best = Switch(loss=math.inf, small_flops=0.0, flops_ratio=1.0, target=target)
    for place in range(1, PLACES):
        spent = total_flops * 1e-4 ** (1 - place / PLACES)
        loss = small.loss(spent)
        if loss <= target:
            break
        ratio = (spent + total_flops - large.flops(loss)) / total_flops
        if ratio < best.flops_ratio and large.flops(loss) > spent:
            best = Switch(loss=loss, small_flops=spent, flops_ratio=ratio, target=target)
    return best
