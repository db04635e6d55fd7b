"""find_decay(): choose λ so that masks settle as in a dense run (FST, arXiv 2404.01847, section 4.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sparsetrain.methods.semi_structured.config import SemiStructured
from sparsetrain.methods.semi_structured.flips import flip_curve
from sparsetrain.surgery.apply import Handle

DECAYS = (2e-6, 6e-6, 2e-5, 6e-5, 2e-4, 6e-4, 2e-3, 6e-3)
"""The published values lie between 6e-6 (cramming BERT) and 6e-3 (DeiT)."""


@dataclass(frozen=True, kw_only=True)
class DecaySweep:
    """What `find_decay` found.

    decay: the λ that was accepted.
    dense_flip_rate: the virtual flip rate r of the dense run, at its end.
    tried: λ -> μ = r′ / r, in the order they were run.
    """

    decay: float
    dense_flip_rate: float
    tried: dict[float, float]


def find_decay(
    train: Callable[[SemiStructured], Handle],
    config: SemiStructured | None = None,
    *,
    decays: Sequence[float] = DECAYS,
    accept: tuple[float, float] = (0.60, 0.95),
) -> DecaySweep:
    """Run a short span densely, then sparse with growing λ, and take the first whose flip-rate ratio is accepted.

    Args:
        train: converts the same starting model with the config it is given, trains the same span on the same data, and
            returns the handle. The span must reach two refreshes.
        config: what will be trained; its `decay` is replaced, and the dense tail is left out of the span.
        decays: candidates; they are run in ascending order.
        accept: bounds of μ = (sparse flip rate) / (virtual flip rate of the dense run), both at the end of the span.

    Raises:
        ValueError: a span without two refreshes, no candidates, or none that is accepted; the message has all (λ, μ).
    """
    config = config or SemiStructured()
    if config.mask_mode == "soft" or not decays:
        found = "mask_mode='soft' has no decay" if decays else "decays is empty"
        raise ValueError(f"find_decay: {found}. Give a masked config and at least one candidate.")
    dense_rate = _last_flip_rate(train(dataclasses.replace(config, decay=0.0, dense_tail_ratio=1.0)))
    tried: dict[float, float] = {}
    for decay in sorted(decays):
        candidate = dataclasses.replace(config, decay=decay, dense_tail_ratio=0.0)
        tried[decay] = _last_flip_rate(train(candidate)) / dense_rate
        if accept[0] <= tried[decay] <= accept[1]:
            return DecaySweep(decay=decay, dense_flip_rate=dense_rate, tried=tried)
    shown = ", ".join(f"{decay:g}: {ratio:.2f}" for decay, ratio in tried.items())
    raise ValueError(
        f"find_decay: no λ has a flip-rate ratio in {accept}; found {shown}. If all are above, give larger λ; if all "
        "are below, smaller; if they step over the interval, give values between, or a longer span."
    )


def _last_flip_rate(handle: Handle) -> float:
    curve = flip_curve(handle)["mean"]
    if len(curve) < 2 or curve[-1][1] == 0:
        raise ValueError(
            f"find_decay: the span has {len(curve)} refreshes and ends with a flip rate of "
            f"{curve[-1][1] if curve else 0}, so there is nothing to compare. Train longer, or lower refresh_every."
        )
    return curve[-1][1]
