"""The losses of the concept bottleneck, the search of the concept matrix, and the soft threshold."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from sparsetrain.ops import concept_bottleneck as op
from sparsetrain.ops.concept_bottleneck.cases import REAL, TINY, Case
from sparsetrain.ops.concept_bottleneck.reference import cosines

cases = pytest.mark.parametrize("case", [*TINY, *REAL], ids=lambda case: case.name)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@cases
def test_concept_matrix_search_is_at_least_as_good_as_zero_shot(case: Case) -> None:
    rows, concepts, classes, labels = case.tensors()
    zero_shot = (cosines(rows, classes).argmax(1) == labels).float().mean()
    found = op.concept_matrix_search(cosines(rows, concepts), cosines(classes, concepts))
    assert (found == labels).float().mean() >= zero_shot - 1e-6
    if case.name == "ten_classes":
        assert zero_shot == 1 and bool((found == labels).all())


@cases
def test_positive_row_scaling_changes_no_prediction(case: Case) -> None:
    rows, concepts, classes, _ = case.tensors()
    v, t = cosines(rows, concepts), cosines(classes, concepts)
    scaled = v * draw(len(v), 1).exp(), t * draw(len(t), 1, seed=1).exp()
    assert torch.equal(op.concept_matrix_search(v, t), op.concept_matrix_search(*scaled))


def test_dividing_rows_by_their_sums_flips_those_with_a_negative_one() -> None:
    t = torch.tensor([[1.0, -0.2, 0.0], [-0.2, 1.0, 0.0]])
    v = torch.tensor([[0.9, -0.3, -0.8], [0.9, -0.3, 0.0]])  # the first row's sum is -0.2
    assert op.concept_matrix_search(v, t).tolist() == [0, 0]
    assert op.concept_matrix_search(v, t, norm="rowsum").tolist() == [1, 0]


def test_the_best_concept_chooses_the_class() -> None:
    v = torch.tensor([[0.1, 0.9, 0.2], [0.5, 0.1, 0.4]])
    t = torch.tensor([[0.3, 0.1, 0.9], [0.2, 0.4, 0.0]])
    assert op.concept_matrix_search(v, t, rule="max_score").tolist() == [1, 0]


def test_the_contrastive_loss_is_the_mean_of_both_cross_entropies_and_has_its_gradient() -> None:
    g = draw(7, 7).double().requires_grad_()
    own = torch.arange(7)
    expected = (F.cross_entropy(g, own) + F.cross_entropy(g.t(), own)) / 2
    torch.testing.assert_close(op.contrastive_loss(g), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(op.contrastive_loss, (g,))
    labels = torch.tensor([0, 0, 1, 2, 1, 3, 4])
    assert torch.autograd.gradcheck(lambda x: op.contrastive_loss(x, labels), (g,))


def test_other_rows_of_a_class_are_no_negatives() -> None:
    g, labels = draw(4, 4), torch.tensor([0, 0, 1, 2])
    changed = g.clone()
    changed[0, 1], changed[1, 0] = 50.0, -30.0
    torch.testing.assert_close(op.contrastive_loss(g, labels), op.contrastive_loss(changed, labels))
    assert op.contrastive_loss(g) != op.contrastive_loss(changed)
    changed[0, 2] += 1
    assert op.contrastive_loss(g, labels) != op.contrastive_loss(changed, labels)
    assert op.contrastive_loss(g, torch.zeros(4)) == 0  # nothing is left to tell apart


def minimised(scores: torch.Tensor, **options: str) -> torch.Tensor:
    g = scores.clone().requires_grad_()
    optimizer = torch.optim.Adam([g], lr=0.05)
    for step in range(300):
        uniform = torch.rand(g.shape, generator=torch.Generator().manual_seed(step))
        loss = op.gumbel_loss(g, noise=op.gumbel_noise(uniform), **options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return g.detach()


def test_the_gumbel_loss_of_the_paper_raises_the_diagonal() -> None:
    found = minimised(draw(32, 32) * 0.1)
    diagonal = found.diagonal().mean()
    rest = found[~torch.eye(32, dtype=torch.bool)].mean()
    assert diagonal > rest + 5
    assert diagonal > 4 and rest < -0.4


@pytest.mark.filterwarnings("ignore:form='official'")
def test_the_official_form_is_least_where_all_scores_are_equal() -> None:
    constant, peaked = torch.zeros(20, 150), torch.zeros(20, 150)
    peaked[torch.arange(20), torch.arange(20)] = 10.0
    least = op.gumbel_loss(constant, form="official").item()
    assert least == pytest.approx(math.log(150), abs=1e-5) and round(least, 2) == 5.01
    assert op.gumbel_loss(peaked, form="official") > least + 3
    assert op.gumbel_loss(draw(20, 150) * 3, form="official") > least
    before = draw(24, 24) * 3
    after = minimised(before, form="official")
    spread = [(x - x.mean(1, keepdim=True)).std() for x in (before, after)]  # a row's softmax knows no row's mean
    assert spread[1] < 0.2 * spread[0]


def test_the_official_form_warns() -> None:
    with pytest.warns(UserWarning, match="flattens"):
        op.gumbel_loss(torch.zeros(2, 3), form="official")


def test_without_noise_and_at_temperature_one_gumbel_is_contrastive() -> None:
    g = draw(5, 5)
    assert op.gumbel_loss(g) == op.contrastive_loss(g)
    assert op.gumbel_loss(g, temperature=2.0) == op.contrastive_loss(g / 2)
    noise = op.gumbel_noise(torch.rand(5, 5))
    torch.testing.assert_close(op.gumbel_loss(g, noise=noise), op.contrastive_loss(g + noise))
    found = op.gumbel_loss(g, score="log_softplus")
    torch.testing.assert_close(found, op.contrastive_loss(F.softplus(g).log()))


def test_gumbel_noise_has_the_mean_and_variance_of_the_distribution() -> None:
    noise = op.gumbel_noise(torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    assert noise.isfinite().all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.01)
    assert noise.var() == pytest.approx(math.pi**2 / 6, rel=0.02)
    assert op.gumbel_noise(torch.tensor([0.0, 1.0])).isfinite().all()


def test_the_soft_threshold_gives_exact_zeros() -> None:
    w = torch.tensor([-2.0, -0.5, -0.4, 0.0, 0.3, 0.5, 1.5])
    torch.testing.assert_close(op.soft_threshold(w, 0.5), torch.tensor([-1.5, 0, 0, 0, 0, 0, 1.0]))
    assert (op.soft_threshold(w, 0.5) == 0).sum() == 5
    assert torch.equal(op.soft_threshold(w, 0.0), w)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: op.contrastive_loss(torch.zeros(3, 5)), "not square"),
        (lambda: op.gumbel_loss(torch.zeros(3, 5)), "not square"),
        (lambda: op.contrastive_loss(torch.zeros(1, 1)), "at least two rows"),
        (lambda: op.contrastive_loss(torch.zeros(2, 2), torch.zeros(3)), "one a row"),
        (lambda: op.contrastive_loss(torch.full((2, 2), torch.nan)), "not finite"),
        (lambda: op.gumbel_loss(torch.zeros(2, 2), hard=True), "logarithm of 0"),
        (lambda: op.gumbel_loss(torch.zeros(2, 2), temperature=0.0), "above 0"),
        (lambda: op.gumbel_loss(torch.zeros(2, 2), form="papers"), "unknown"),
        (lambda: op.gumbel_loss(torch.zeros(2, 2), score="log"), "unknown"),
        (lambda: op.concept_matrix_search(torch.zeros(2, 3), torch.zeros(2, 4)), "one column a concept"),
        (lambda: op.concept_matrix_search(torch.zeros(2, 3), torch.zeros(2, 3), rule="best"), "unknown"),
        (lambda: op.concept_matrix_search(torch.full((2, 3), torch.inf), torch.zeros(2, 3)), "not finite"),
        (lambda: op.soft_threshold(torch.zeros(3), -1.0), "0 or more"),
    ],
)
def test_bad_input_is_told(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
