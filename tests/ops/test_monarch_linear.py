"""The Monarch linear: the definition, the projection and what the class of matrices holds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.core.errors import Unsupported
from sparsetrain.ops.monarch_linear import dense_of, gain, monarch_linear, project, project_diagonal
from sparsetrain.ops.monarch_linear.cases import TINY, TOLERANCE, Case

by_name = pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def far(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def results(case: Case, dtype: torch.dtype, **options: object) -> list[Tensor]:
    """y and every gradient."""
    *given, dy = case.tensors(dtype)
    leaves = [tensor.requires_grad_() for tensor in given if tensor is not None]
    x, right, *left, bias = leaves
    y = monarch_linear(x, right, left[0] if left else None, bias, **options)  # type: ignore[arg-type]
    return [y, *torch.autograd.grad(y, leaves, dy)]


@by_name
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("columns", [False, True])
def test_the_faster_path_equals_the_reference_in_value_and_gradients(
    case: Case, dtype: torch.dtype, columns: bool
) -> None:
    for found, wanted in zip(results(case, dtype, columns=columns), results(case, dtype, backend="reference")):
        assert found.shape == wanted.shape and far(found, wanted) <= TOLERANCE[dtype]


@by_name
def test_it_is_the_product_with_the_dense_weight(case: Case) -> None:
    x, right, left, bias, _ = case.tensors(torch.float64)
    weight = dense_of(right, left)
    assert weight.shape == (case.outputs, case.inputs)
    assert far(monarch_linear(x, right, left, bias), F.linear(x, weight, bias)) < 1e-14


@by_name
def test_gradcheck(case: Case) -> None:
    *given, _ = case.tensors(torch.float64)
    leaves = [None if tensor is None else tensor.requires_grad_() for tensor in given]
    assert torch.autograd.gradcheck(lambda *tensors: monarch_linear(*tensors), leaves)  # type: ignore[arg-type]


def test_the_entries_are_those_of_the_paper() -> None:
    """M[m j; k i] = L[j, m, k] R[k, j, i] in the square case, m = 3 (section 3.1)."""
    right, left = draw(3, 3, 3), draw(3, 3, 3, seed=1)  # R[k, j, i], L[j, m, k]
    expected = torch.einsum("jlk,kji->ljki", left, right).reshape(9, 9)
    assert far(dense_of(right, left), expected) < 1e-15


def test_columns_stay_columns_forward_and_backward() -> None:
    x, right, left, bias, dy = (TINY[1]).tensors(torch.float64)
    assert left is not None
    x = x.t().contiguous().t().requires_grad_()
    y = monarch_linear(x, right, left, bias, columns=True)
    assert y.t().is_contiguous() and monarch_linear(x, right, left, bias).is_contiguous()
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.t().is_contiguous()


def test_only_the_input_and_the_middle_are_saved() -> None:
    x, right, left, bias, _ = TINY[1].tensors(torch.float64)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        monarch_linear(x, right.requires_grad_(), left, bias)
    assert left is not None and sorted(kept) == sorted([x.numel(), right.numel(), left.numel(), 7 * 12])


def test_a_frozen_operand_gets_no_gradient() -> None:
    x, right, left, bias, dy = TINY[0].tensors(torch.float64)
    y = monarch_linear(x, right.requires_grad_(), left, bias)
    assert torch.autograd.grad(y, right, dy)[0].shape == right.shape


@pytest.mark.parametrize("case", [case for case in TINY if case.name in ("tall", "one_factor")], ids=lambda c: c.name)
def test_autocast_computes_in_its_dtype(case: Case) -> None:
    x, right, left, bias, _ = case.tensors(torch.float32)
    exact = monarch_linear(x, right, left, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = monarch_linear(x, right, left, bias)
    assert y.dtype == torch.bfloat16 and far(y.float(), exact) < 2e-2


def test_bf16_is_no_worse_than_the_reference() -> None:
    x, right, left, bias, _ = Case(
        name="wide", rows=(64,), outputs=256, inputs=64, blocks_in=4, blocks_out=4, rank=4
    ).tensors(torch.float32)
    assert left is not None
    exact = monarch_linear(x, right, left, bias)
    given = (x.bfloat16(), right.bfloat16(), left.bfloat16(), bias.bfloat16())
    errors = [far(monarch_linear(*given, backend=name).float(), exact) for name in ("torch", "reference")]
    assert errors[0] <= errors[1] * 1.05


def test_bad_sizes_say_what_to_do() -> None:
    x, right, left, _, _ = TINY[0].tensors(torch.float64)
    with pytest.raises(ValueError, match="x has 15 channels"):
        monarch_linear(x[..., :15], right, left)
    with pytest.raises(ValueError, match="k·q = m·r"):
        monarch_linear(x, right, right[:, :, :3])
    with pytest.raises(ValueError, match="bias"):
        monarch_linear(x, right, left, torch.zeros(3, dtype=torch.float64))
    with pytest.raises(Unsupported, match="the kernel takes"):
        monarch_linear(x, right, left, backend="triton")


SIZES = [(16, 16, 4, 4, 1), (64, 64, 8, 8, 1), (96, 48, 4, 4, 3), (36, 60, 6, 4, 2)]
"""outputs, inputs, k, m, rank."""
KEPT = dict(zip(SIZES, (0.5, 0.25, 0.375, 0.422), strict=True))
"""Numbers in the factors over those of the dense weight, of which the page gives the last three."""
LARGE = [(768, 768, 4, 4, 48), (3072, 768, 4, 4, 48)]


@pytest.mark.parametrize("size", [*SIZES, *LARGE], ids=str)
def test_a_projected_monarch_matrix_is_itself(size: tuple[int, ...]) -> None:
    """Oracle 1: relative error at most 2.3e-15 (the two largest take a second for their SVDs)."""
    outputs, inputs, k, m, rank = size
    weight = dense_of(draw(k, rank * m, inputs // k), draw(m, outputs // m, k * rank, seed=1))
    right, left, lost = project(weight, k, m, rank)
    if size in KEPT:
        assert (right.numel() + left.numel()) / weight.numel() == pytest.approx(KEPT[size], abs=5e-4)
    # rounding of the SVD: 2.3e-15 with one LAPACK, 2.8e-15 with another at the largest
    assert far(dense_of(right, left), weight) <= (2.3e-15 if outputs < 100 else 5e-15) and lost < 1e-29


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_what_a_projection_loses_is_the_discarded_singular_values(size: tuple[int, ...]) -> None:
    """Oracle 2, against numbers that come from a loop over the blocks."""
    outputs, inputs, k, m, rank = size
    weight = draw(outputs, inputs)
    right, left, lost = project(weight, k, m, rank)
    discarded = 0.0
    for block_in in range(k):
        for block_out in range(m):
            columns = slice(block_in * inputs // k, (block_in + 1) * inputs // k)
            discarded += float(torch.linalg.svdvals(weight[block_out::m, columns])[rank:].square().sum())
    error = float((weight - dense_of(right, left)).square().sum())
    assert abs(error / discarded - 1) < 1e-13
    if size == (36, 60, 6, 4, 2):
        assert (right.numel() + left.numel()) / weight.numel() == pytest.approx(0.422, abs=5e-4)
    assert float(lost) == pytest.approx(discarded / float(weight.square().sum()), rel=1e-13)


def test_no_other_factors_are_nearer() -> None:
    """Gradient descent from the projection gains nothing: it is a stationary point, and random ones are farther."""
    weight = draw(12, 12)
    right, left, _ = project(weight, 2, 2, 2)
    best = (weight - dense_of(right, left)).square().sum()
    leaves = [right.requires_grad_(), left.requires_grad_()]
    loss = (weight - dense_of(*leaves)).square().sum()
    assert all(grad.abs().max() < 1e-13 for grad in torch.autograd.grad(loss, leaves))
    for seed in range(20):
        moved = [leaf.detach() + 0.1 * draw(*leaf.shape, seed=seed) for leaf in leaves]
        assert (weight - dense_of(*moved)).square().sum() > best


def test_the_dft_is_represented_exactly() -> None:
    """Oracle 4: 64 points, inputs in the order of reversed base-8 digits; the tail is 3.9e-31 of the whole."""
    n, m = 64, 8
    dft = torch.fft.fft(torch.eye(n, dtype=torch.float64)).to(torch.complex128)
    digits = torch.arange(n).view(m, m).t().flatten()
    blocks = dft[:, digits].reshape(m, m, m, m).permute(2, 1, 0, 3)  # (k, m, s, p), complex
    sigma = torch.linalg.svdvals(blocks)
    assert float(sigma[..., 1:].square().sum() / sigma.square().sum()) < 1e-30
    unordered = torch.linalg.svdvals(dft.reshape(m, m, m, m).permute(2, 1, 0, 3))
    assert float(unordered[..., 1:].square().sum() / unordered.square().sum()) > 0.1
    # its real part alone has rank 2 in every block
    right, left, lost = project(dft.real[:, digits].contiguous(), m, m, 2)
    assert float(lost) < 1e-29 and far(dense_of(right, left), dft.real[:, digits]) < 1e-14


def test_factors_of_a_product_of_two_are_found_again() -> None:
    """M = M1 M2ᵀ is P (A_i D_ij C_j) Pᵀ; one eigenbasis gives the factors back (arXiv 2204.00595, appendix C)."""
    m = 5
    one, two = (dense_of(draw(m, m, m, seed=i), draw(m, m, m, seed=i + 1)) for i in (0, 2))
    product = one @ two.t()
    order = torch.arange(m * m).view(m, m).t().flatten()
    blocks = product[order][:, order].reshape(m, m, m, m).transpose(1, 2).to(torch.complex128)  # (i, j, a, b)
    inverse = torch.linalg.inv(blocks)
    mixed = sum(
        (0.3 + i + 0.7 * j) * inverse[i, 0] @ blocks[i, j] @ inverse[0, j] @ blocks[0, 0]
        for i in range(1, m)
        for j in range(1, m)
    )
    basis = torch.linalg.eig(mixed).eigenvectors  # the columns of C_1⁻¹
    a = blocks[:, 0] @ basis
    c = torch.linalg.inv(a[0]) @ blocks[0]
    d = torch.linalg.inv(a)[:, None] @ blocks @ torch.linalg.inv(c)[None]
    off = d - torch.diag_embed(d.diagonal(dim1=-2, dim2=-1))
    assert float(off.norm() / d.norm()) < 1e-9, "every middle block is diagonal"
    again = a[:, None] @ torch.diag_embed(d.diagonal(dim1=-2, dim2=-1)) @ c[None]
    assert float((again - blocks).norm() / blocks.norm()) < 1e-9


def test_the_nearest_diagonam_blocks_are_the_matrix_s_own() -> None:
    weight = draw(12, 8)
    right, lost = project_diagonal(weight, 4)
    expected = torch.block_diag(*(weight[3 * i : 3 * i + 3, 2 * i : 2 * i + 2] for i in range(4)))
    assert torch.equal(dense_of(right, None), expected)
    assert float(lost) == pytest.approx(float((weight - expected).square().sum() / weight.square().sum()))


def test_a_projection_that_cannot_be_says_why() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        project(draw(10, 12), 4, 4, 1)
    for rank in (0, 4):
        with pytest.raises(ValueError, match="between 1 and 3"):
            project(draw(12, 12), 4, 4, rank)
    broken = draw(8, 8)
    broken[1, 2] = math.nan
    with pytest.raises(ValueError, match="1 of 64 weights are not finite"):
        project(broken, 2, 2, 1)
    assert project(torch.zeros(8, 8), 2, 2, 1)[2] == 0


def test_a_gain_is_timed_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path))
    gain._gain_here.cache_clear()
    asked = ((2, 8, 8), (2, 16, 8), 16, torch.float32, "cpu")
    threads = torch.get_num_threads()
    first = gain.gain_here(*asked)
    assert torch.get_num_threads() == threads
    assert (first.in_features, first.out_features, first.tokens) == (16, 32, 16)
    assert first.dense_ms > 0 and first.ratio > 0 and "16 -> 32" in str(first)
    gain._gain_here.cache_clear()
    monkeypatch.setattr(gain, "measure_gain", lambda *_: pytest.fail("it was timed again"))
    assert gain.gain_here(*asked) == first
    gain._gain_here.cache_clear()


def test_the_break_even_width_is_the_first_that_pays() -> None:
    def made(right: tuple[int, ...], *_: object) -> gain.Gain:
        width = right[0] * right[2]
        return gain.Gain(
            in_features=width, out_features=width, num_blocks=4, tokens=1, dtype="", device="", dense_ms=1.0,
            monarch_ms=1.0, ratio=1.1 if width >= 700 else 0.9,
        )  # fmt: skip

    assert gain.break_even(4, 1, torch.float32, "cpu", made) == 768
    assert gain.break_even(4, 1, torch.float32, "cpu", lambda right, *_: made((4, 1, 1))) is None
