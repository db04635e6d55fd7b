"""PST's linear: its gradients against the written formulas and against autograd, its masks, and what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from sparsetrain.ops.masked_linear import Factors, Rule, masked_linear, masked_scores, masked_weight
from sparsetrain.ops.masked_linear.cases import TINY, Case
from sparsetrain.ops.nm_mask import nm_mask
from sparsetrain.ops.topk_mask import count_zeros, topk_mask

cases = pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)


def zeros_of(case: Case, weight: Tensor) -> int:
    return count_zeros(weight.numel(), case.keep_ratio)


def fresh(factors: Factors) -> Factors:
    """As they start: V, B, R and C are 0."""
    zero = [torch.zeros_like(factor) for factor in factors]
    return Factors(factors.u, zero[1], factors.a, *zero[3:])


def gradients(case: Case, recompute: bool) -> tuple[Tensor, list[Tensor]]:
    x, weight, bias, factors = case.tensors()
    leaves = [x, bias, *factors]
    for leaf in leaves:
        leaf.requires_grad_()
    y = masked_linear(x, weight, bias, factors, zeros_of(case, weight), case.rule, recompute=recompute)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return y, list(torch.autograd.grad(y, leaves, dy))


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)


@cases
def test_recomputing_equals_plain_autograd(case: Case) -> None:
    y, found = gradients(case, recompute=True)
    plain_y, plain = gradients(case, recompute=False)
    assert torch.equal(y, plain_y)
    for one, other in zip(found, plain, strict=True):
        assert_near(one, other, case.tolerance)


@cases
@pytest.mark.parametrize("recompute", [True, False])
def test_gradients_are_the_written_ones(case: Case, recompute: bool) -> None:
    x, weight, bias, f = case.tensors()
    y, (dx, _, du, dv, da, db, drow, dcolumn) = gradients(case, recompute)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    rule, tolerance = case.rule, case.tolerance
    updated = weight + rule.weight_scale * f.u @ f.v
    mask = topk_mask(masked_scores(weight, f, rule), zeros_of(case, weight))
    g = dy.t() @ x
    p = g * updated
    d = g * mask + (0 if rule.detach_magnitude else g * updated.abs())
    assert_near(dv, rule.weight_scale * f.u.t() @ d, tolerance)
    assert_near(du, rule.weight_scale * d @ f.v.t(), tolerance)
    assert_near(db, rule.score_scale * f.a.t() @ p, tolerance)
    assert_near(da, rule.score_scale * p @ f.b.t(), tolerance)
    assert_near(drow, rule.line_scale * p.sum(1), tolerance)
    assert_near(dcolumn, rule.line_scale * p.sum(0), tolerance)
    assert_near(dx, dy @ (mask * updated), tolerance)
    assert_near(y, x @ (mask * updated).t() + bias, tolerance)


@cases
def test_the_first_mask_is_the_magnitude_mask(case: Case) -> None:
    _, weight, _, factors = case.tensors()
    zeros = zeros_of(case, weight)
    found = masked_weight(weight, fresh(factors), zeros, case.rule)
    scores = weight.abs()
    if case.rule.pattern == "2:4":
        scores = scores.masked_fill(nm_mask(weight), torch.inf)
    assert torch.equal(found, weight * topk_mask(scores, zeros))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_zeros_it_is_the_dense_linear_bit_for_bit(dtype: torch.dtype) -> None:
    x, weight, bias, factors = Case(name="", tokens=9, out_features=24, in_features=40).tensors(dtype)
    expected = F.linear(x, weight, bias)
    assert torch.equal(masked_linear(x, weight, bias, fresh(factors), 0), expected)


@cases
def test_the_masked_weight_has_exactly_as_many_zeros_and_gives_the_same_output(case: Case) -> None:
    x, weight, bias, factors = case.tensors()
    zeros = zeros_of(case, weight)
    merged = masked_weight(weight, factors, zeros, case.rule)
    assert int((merged == 0).sum()) == zeros
    assert torch.equal(F.linear(x, merged, bias), masked_linear(x, weight, bias, factors, zeros, case.rule))
    if case.rule.pattern == "2:4" and case.keep_ratio == 0.5:
        assert torch.equal(merged != 0, nm_mask(masked_scores(weight, factors), by="value"))
        assert ((merged != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()


def test_a_weight_stored_in_by_out_is_masked_alike() -> None:
    x, weight, bias, factors = Case(name="").tensors()
    stored = weight.t().contiguous().t()
    expected = masked_linear(x, weight, bias, factors, 60)
    assert_near(masked_linear(x, stored, bias, factors, 60), expected, 1e-14)


def test_autocast_computes_masks_in_fp32_and_products_in_bf16() -> None:
    x, weight, bias, factors = Case(name="", out_features=64, in_features=64).tensors(torch.float32)
    for factor in factors:
        factor.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = masked_linear(x, weight, bias, factors, 2000)
    expected = F.linear(x.bfloat16(), masked_weight(weight, factors, 2000).bfloat16(), bias.bfloat16())
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert all(factor.grad is not None and factor.grad.dtype == torch.float32 for factor in factors)
    assert int((masked_weight(weight.bfloat16(), factors, 2000) == 0).sum()) >= 2000


def test_the_weight_gets_no_gradient_and_a_frozen_bias_none() -> None:
    x, weight, bias, factors = Case(name="").tensors()
    weight.requires_grad_()
    factors.u.requires_grad_()
    masked_linear(x, weight, bias, factors, 50).sum().backward()
    assert weight.grad is None and factors.u.grad is not None


def kept_bytes(forward: Any, model: list[Tensor]) -> int:
    """Bytes that a forward keeps for its backward, beside those of the model, each storage once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in model}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    y.sum().backward()
    return sum(found.values())


def test_it_keeps_its_input_and_three_numbers() -> None:
    case = Case(name="", tokens=512, out_features=192, in_features=128, rank=8, score_rank=8)
    x, weight, bias, factors = case.tensors(torch.float32)
    for tensor in (x, *factors):
        tensor.requires_grad_()
    own = [weight, bias, *factors]
    ours = kept_bytes(lambda: masked_linear(x, weight, bias, factors, 20000), own)
    plain = kept_bytes(lambda: masked_linear(x, weight, bias, factors, 20000, recompute=False), own)
    assert x.nbytes <= ours <= x.nbytes + 64
    assert plain >= x.nbytes + 3 * weight.nbytes


def test_bad_input_is_an_error() -> None:
    x, weight, bias, factors = Case(name="").tensors()
    with pytest.raises(ValueError, match="x has 15 channels"):
        masked_linear(x[:, :15], weight, bias, factors, 3)
    with pytest.raises(ValueError, match="factor column is"):
        masked_linear(x, weight, bias, factors._replace(column=factors.row), 3)
    with pytest.raises(ValueError, match="can have 0 to 96 with pattern='2:4'"):
        masked_linear(x, weight, bias, factors, 97, Rule(pattern="2:4"))
    with pytest.raises(ValueError, match="pattern='2:3' is unknown"):
        Rule(pattern="2:3")
