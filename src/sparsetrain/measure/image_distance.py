"""How far one set of images is from another, by features of theirs: FID and KID.

    FID = |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½)                                     (arXiv 1706.08500)
    KID = mean k(a, a') + mean k(b, b') − 2 mean k(a, b),   k(x, y) = (x·y / d + 1)³       (arXiv 1801.01401)

FID falls with the number of images, so that only those of equal numbers compare; KID's estimator is unbiased.
"""

from __future__ import annotations

import numpy as np

_ROWS = 1024
"""Of a kernel's matrix at once."""


def frechet_distance(a_nd: np.ndarray, b_nd: np.ndarray) -> float:
    """FID of two sets of features, float64.

    Raises:
        ValueError: fewer than two rows, other widths, or values that are not finite.
    """
    a_nd, b_nd = _checked(a_nd, b_nd)
    return frechet_of_normals(a_nd.mean(0), np.cov(a_nd.T).reshape(2 * (a_nd.shape[1],)),
                              b_nd.mean(0), np.cov(b_nd.T).reshape(2 * (b_nd.shape[1],)))  # fmt: skip


def frechet_of_normals(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """FID of two normal distributions, by their means [d] and covariances [d, d].

    tr (Σ_a Σ_b)^½ = tr (Σ_a^½ Σ_b Σ_a^½)^½, which is symmetric: its roots are real.
    """
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    together = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    found = np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * together
    return max(0.0, float(found))  # rounding of equal sets


def kernel_distance(a_nd: np.ndarray, b_nd: np.ndarray) -> float:
    """KID of two sets of features, by all pairs; unbiased, so that it may be below 0.

    Raises:
        ValueError: as `frechet_distance`.
    """
    a_nd, b_nd = _checked(a_nd, b_nd)
    n, m = len(a_nd), len(b_nd)
    own = [(_kernel_sum(x, x) - (_kernel(np.square(x).sum(1), x.shape[1])).sum()) for x in (a_nd, b_nd)]
    return float(own[0] / (n * (n - 1)) + own[1] / (m * (m - 1)) - 2 * _kernel_sum(a_nd, b_nd) / (n * m))


def _kernel_sum(a_nd: np.ndarray, b_md: np.ndarray) -> float:
    parts = (a_nd[i : i + _ROWS] @ b_md.T for i in range(0, len(a_nd), _ROWS))
    return sum(float(_kernel(part, a_nd.shape[1]).sum()) for part in parts)


def _kernel(product: np.ndarray, width: int) -> np.ndarray:
    return (product / width + 1) ** 3


def _checked(a_nd: np.ndarray, b_nd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a_nd, b_nd = np.asarray(a_nd, dtype=np.float64), np.asarray(b_nd, dtype=np.float64)
    if a_nd.ndim != 2 or b_nd.ndim != 2 or a_nd.shape[1] != b_nd.shape[1] or min(len(a_nd), len(b_nd)) < 2:
        raise ValueError(
            f"features of shape {a_nd.shape} and {b_nd.shape}: give two sets of two rows or more, of one width."
        )
    if not (np.isfinite(a_nd).all() and np.isfinite(b_nd).all()):
        raise ValueError("features hold NaN or infinity: the images or what reads them are damaged.")
    return a_nd, b_nd
