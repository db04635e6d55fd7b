"""Intervals against published tables and against what they promise: to cover the truth as often as they say."""

from __future__ import annotations

import math
import random

import pytest

from sparsetrain.measure.intervals import _student, mean_interval, signed_rank_interval


def test_the_signed_rank_interval_is_the_textbook_s() -> None:
    # n = 9, 95 %: the table's place is 6, so the 6th smallest and the 6th largest of the 45 averages
    values = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0]
    averages = sorted((a + b) / 2 for i, a in enumerate(values) for b in values[i:])
    assert signed_rank_interval(values, 0.95) == (averages[5], averages[-6])
    # too few to be that sure: 2 / 2^5 is over 5 %
    assert signed_rank_interval(values[:5], 0.95) is None
    assert signed_rank_interval(values[:6], 0.95) == (values[0], values[5])
    assert signed_rank_interval(values[:6], 0.983) is None and signed_rank_interval(values[:7], 0.983) is not None


def test_the_normal_approximation_joins_the_exact_places() -> None:
    draw = random.Random(0)
    exact, near = ([draw.gauss(0, 1) for _ in range(n)] for n in (50, 51))
    wide = [high - low for low, high in (signed_rank_interval(v, 0.95) for v in (exact, near))]  # type: ignore[misc]
    assert 0.7 < wide[0] / wide[1] < 1.4


@pytest.mark.parametrize("num_pairs", [7, 20, 80])
def test_the_signed_rank_interval_covers_the_truth(num_pairs: int) -> None:
    draw, missed = random.Random(1), 0
    for _ in range(400):  # heavy tails: a difference of two exponentials
        found = signed_rank_interval([3 + draw.expovariate(1) - draw.expovariate(1) for _ in range(num_pairs)], 0.95)
        assert found is not None
        missed += not found[0] <= 3 <= found[1]
    assert missed <= 400 * 0.05 + 3 * math.sqrt(400 * 0.05 * 0.95)


def test_one_slow_pair_does_not_move_the_verdict() -> None:
    calm = [0.4, 0.41, 0.39, 0.4, 0.42, 0.38, 0.4, 0.41, 0.4, 0.39] * 2
    low, high = signed_rank_interval([*calm, -5.0], 0.983)  # type: ignore[misc]
    assert 0.3 < low < 0.4 < high < 0.45


def test_student_s_quantiles_are_the_table_s() -> None:
    for freedom, value in ((5, 2.571), (9, 2.262), (30, 2.042), (1000, 1.962)):
        assert _student(0.975, freedom) == pytest.approx(value, abs=2e-3)


def test_the_mean_s_interval_counts_rows_and_not_tokens() -> None:
    sums, counts = [2.0, 4.0, 6.0, 8.0, 10.0, 12.0], [1.0] * 6
    low, high = mean_interval(sums, counts)  # type: ignore[misc]
    assert (low, high) == pytest.approx((7 - 2.571 * math.sqrt(14 / 6), 7 + 2.571 * math.sqrt(14 / 6)), abs=5e-3)
    # a thousand tokens a row are no more rows
    assert mean_interval([1000 * s for s in sums], [1000.0] * 6) == pytest.approx((low, high))
    assert mean_interval([0.3, 0.6, 0.9, 1.2, 1.5, 1.8], [1, 2, 3, 4, 5, 6]) == pytest.approx((0.3, 0.3))
    assert mean_interval(sums[:5], counts[:5]) is None


def test_the_mean_s_interval_covers_the_truth_for_rows_of_unequal_length() -> None:
    draw, missed = random.Random(2), 0
    for _ in range(400):
        counts = [draw.randint(5, 60) for _ in range(16)]
        sums = [sum(draw.gauss(0.02, 0.5) for _ in range(count)) for count in counts]
        low, high = mean_interval(sums, counts)  # type: ignore[misc]
        missed += not low <= 0.02 <= high
    assert missed <= 400 * 0.05 + 3 * math.sqrt(400 * 0.05 * 0.95)
