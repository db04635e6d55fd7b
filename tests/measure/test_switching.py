"""The prediction of when to leave a small model, on curves whose answer is known."""

from __future__ import annotations

import math

import pytest

from sparsetrain.measure.switching import PowerLaw, best_switch, fitted


def test_a_law_is_found_again_from_its_points() -> None:
    law = PowerLaw(floor=1.2, scale=30.0, exponent=0.25)
    flops = [10.0**power for power in range(3, 11)]
    found = fitted(flops, [law.loss(spent) for spent in flops])
    assert found.floor == pytest.approx(1.2, abs=0.01) and found.exponent == pytest.approx(0.25, abs=0.002)
    assert found.error < 1e-3 and law.flops(law.loss(1e7)) == pytest.approx(1e7) and law.flops(1.1) == math.inf


def test_the_switch_is_where_both_fall_as_steeply() -> None:
    small = PowerLaw(floor=0.02, scale=1.0, exponent=0.5)
    large = PowerLaw(floor=0.0, scale=10.0, exponent=0.6)

    def steepness(law: PowerLaw, loss: float) -> float:
        return law.scale * law.exponent * law.flops(loss) ** (-law.exponent - 1)

    found = best_switch(small, large, 1e6)
    assert steepness(small, found.loss) == pytest.approx(steepness(large, found.loss), rel=0.02)
    spent = found.small_flops + 1e6 - large.flops(found.loss)
    assert found.flops_ratio == pytest.approx(spent / 1e6) and found.flops_ratio < 1
    assert found.target == pytest.approx(large.loss(1e6)) and found.target < found.loss


def test_a_small_model_that_gains_nothing_is_left_out() -> None:
    law = PowerLaw(floor=1.0, scale=10.0, exponent=0.5)
    worse = PowerLaw(floor=1.0, scale=20.0, exponent=0.5)
    found = best_switch(worse, law, 1e6)
    assert found.small_flops == 0 and found.flops_ratio == 1 and found.target == pytest.approx(1.01)


@pytest.mark.parametrize("losses", [[3.0, 2.0, 1.5], [3.0, 3.1, 3.2, 3.3]])
def test_too_few_points_or_none_that_fall(losses: list[float]) -> None:
    with pytest.raises(ValueError, match="more steps"):
        fitted([1.0, 2.0, 3.0, 4.0][: len(losses)], losses)
