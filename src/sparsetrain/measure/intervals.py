"""Intervals of paired differences: what two runs that met the same machine, or the same rows, can be told apart by.

Both are for pairs, so what moves both of a pair alike (a busy machine, a hard text) cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count
from statistics import NormalDist

import numpy as np

FEWEST = 6
"""Rows below which no interval of a mean is given: Student's t trusts a normal mean, which few skewed rows have not."""
_EXACT = 50  # pairs up to which the signed-rank distribution is counted out
_MOST = 1000  # pairs of which averages are taken: half a million


def signed_rank_interval(differences: Sequence[float], level: float) -> tuple[float, float] | None:
    """Wilcoxon's signed-rank interval of the centre of `differences`, at least `level` sure.

    Its ends are order statistics of the averages (d_i + d_j) / 2, i <= j, whose median is the Hodges-Lehmann estimate.
    It supposes that differences lie symmetrically about the centre, as those of two times that meet the same noise
    do, and nothing of the noise's kind: among twenty pairs, one that is far off changes no verdict. Source: Hollander,
    Wolfe and Chicken, Nonparametric Statistical Methods, 3rd edition, sections 3.1 to 3.3; Hodges and Lehmann, Annals
    of Mathematical Statistics 34 (1963).

    Args:
        differences: one a pair; of more than 1,000, as many that are evenly spaced are used.
        level: in (0, 1).

    Returns:
        (low, high); None where so few pairs give no interval of that level: 6 are needed for .95, 7 for .983.
    """
    d_n = np.asarray(differences, dtype=float)
    if len(d_n) > _MOST:
        d_n = d_n[np.linspace(0, len(d_n) - 1, _MOST).astype(int)]
    place = _lower_place(len(d_n), (1 - level) / 2)
    if place < 1:
        return None
    averages = np.sort((np.add.outer(d_n, d_n) / 2)[np.triu_indices(len(d_n))])
    return float(averages[place - 1]), float(averages[-place])


def mean_interval(sums: Sequence[float], counts: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Student's interval of Σ sums / Σ counts, where each row brings one of each: the rows are drawn, not the tokens.

    The standard error is a ratio's: sqrt(n / (n-1) · Σ (s_i - R c_i)²) / Σ c_i with R = Σ s / Σ c (Cochran, Sampling
    Techniques, 3rd edition, section 6.4); t has n - 1 degrees of freedom.

    Args:
        sums: a row's summed differences. counts: over how many targets.

    Returns:
        (low, high); None for fewer than `FEWEST` rows.
    """
    s_n, c_n, n = np.asarray(sums, dtype=float), np.asarray(counts, dtype=float), len(sums)
    if n < FEWEST or c_n.sum() <= 0:
        return None
    mean = float(s_n.sum() / c_n.sum())
    error = math.sqrt(n / (n - 1) * float(((s_n - mean * c_n) ** 2).sum())) / float(c_n.sum())
    half = _student(0.5 + level / 2, n - 1) * error
    return mean - half, mean + half


def _lower_place(num_pairs: int, tail: float) -> int:
    """The largest c with P(T+ <= c - 1) <= tail, T+ the signed-rank statistic under no difference; 0 for none."""
    n = num_pairs
    if n > _EXACT:
        spread = math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
        return math.floor(n * (n + 1) / 4 + NormalDist().inv_cdf(tail) * spread)
    ways = [1]  # to draw ranks of 1 to n whose sum is the index
    for rank in range(1, n + 1):
        longer = ways + [0] * rank
        for total, number in enumerate(ways):
            longer[total + rank] += number
        ways = longer
    below = 0
    for c in count():
        if c >= len(ways):
            return c
        below += ways[c]
        if below > tail * 2**n:
            return c
    raise AssertionError("unreachable")


def _student(share: float, freedom: int) -> float:
    """Student's quantile by Cornish and Fisher's expansion (Abramowitz and Stegun 26.7.5); 1e-3 near at 5 degrees."""
    z, v = NormalDist().inv_cdf(share), freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / v**power for power, term in enumerate(terms, 1))
