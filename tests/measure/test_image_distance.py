"""FID and KID: known values, sets equal to themselves, and an estimator without bias."""

from __future__ import annotations

import numpy as np
import pytest

from sparsetrain.measure.image_distance import frechet_distance, frechet_of_normals, kernel_distance


def test_normals_of_diagonal_covariance() -> None:
    """|μ|² + Σ (σ_a − σ_b)²."""
    found = frechet_of_normals(np.array([1.0, 2.0]), np.diag([4.0, 9.0]), np.array([0.0, 0.0]), np.diag([1.0, 1.0]))
    assert found == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 1) ** 2, abs=1e-12)


def test_normals_that_do_not_commute() -> None:
    """tr (Σ_a Σ_b)^½ from the roots of the product's own eigenvalues, which are real and positive."""
    random = np.random.default_rng(0)
    a, b = (m @ m.T for m in random.standard_normal((2, 5, 5)))
    together = np.sqrt(np.linalg.eigvals(a @ b).real).sum()
    found = frechet_of_normals(np.zeros(5), a, np.zeros(5), b)
    assert found == pytest.approx(np.trace(a) + np.trace(b) - 2 * together, rel=1e-9)
    assert found == pytest.approx(frechet_of_normals(np.zeros(5), b, np.zeros(5), a), rel=1e-9)


def test_a_set_and_itself() -> None:
    x = np.random.default_rng(0).standard_normal((200, 8))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x[::-1]) == pytest.approx(0, abs=1e-9)
    shifted = x + 3.0  # covariance as before: the mean alone
    assert frechet_distance(x, shifted) == pytest.approx(8 * 9.0, rel=1e-9)
    assert frechet_distance(x, 2 * x) == pytest.approx(np.trace(np.cov(x.T)) + np.square(x.mean(0)).sum(), rel=1e-9)


def test_fewer_images_than_features() -> None:
    x = np.random.default_rng(0).standard_normal((5, 64))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_by_hand() -> None:
    a, b = np.array([[1.0], [0.0], [2.0]]), np.array([[0.0], [3.0]])
    k = lambda x, y: (float(x) * float(y) + 1) ** 3  # noqa: E731
    own_a = sum(k(a[i, 0], a[j, 0]) for i in range(3) for j in range(3) if i != j) / 6
    own_b = sum(k(b[i, 0], b[j, 0]) for i in range(2) for j in range(2) if i != j) / 2
    cross = sum(k(x, y) for x in a[:, 0] for y in b[:, 0]) / 6
    assert kernel_distance(a, b) == pytest.approx(own_a + own_b - 2 * cross, rel=1e-12)


def test_kernel_distance_has_no_bias() -> None:
    """Over many small sets of one distribution its mean is 0, and a biased one's would not be."""
    random = np.random.default_rng(0)
    found = [kernel_distance(*random.standard_normal((2, 12, 4))) for _ in range(3000)]
    error = np.std(found) / len(found) ** 0.5
    assert abs(np.mean(found)) < 4 * error
    assert min(found) < 0
    own = (1 + np.square(random.standard_normal((12, 4))).sum(1).mean() / 4) ** 3 / 12 - 1 / 12
    assert own > 20 * error  # what leaving the diagonal in would add is seen by this test


def test_what_cannot_be_compared_is_told() -> None:
    x = np.zeros((4, 3))
    for wrong in (np.zeros((1, 3)), np.zeros((4, 2)), np.zeros(4)):
        with pytest.raises(ValueError, match="two sets of two rows or more, of one width"):
            frechet_distance(x, wrong)
    with pytest.raises(ValueError, match="NaN or infinity"):
        kernel_distance(x, np.full((4, 3), np.nan))
