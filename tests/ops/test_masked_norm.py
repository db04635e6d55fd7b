"""Masked norms: what they are at c = 0, in between, and at c = 1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.ops.masked_norm import masked_layer_norm, masked_rms_norm
from sparsetrain.ops.masked_norm.cases import TINY, TOLERANCES, Case

every = pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
EPS = 1e-5


def mask(case: Case, value: float) -> Tensor:
    found = torch.ones(case.channels, dtype=torch.float64)
    found[case.num_old :] = value
    return found


def norms(x: Tensor, c: Tensor, num_old: int, w: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {
        "layer": masked_layer_norm(x, c, num_old, w, b, EPS),
        "rms": masked_rms_norm(x, c, num_old, w, EPS),
    }


@every
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_with_a_mask_of_ones_they_are_the_plain_norms(case: Case, dtype: torch.dtype) -> None:
    x, w, b = case.tensors(dtype)
    found = norms(x, mask(case, 1.0), case.num_old, w, b)
    expected = {
        "layer": F.layer_norm(x.double(), x.shape[-1:], w.double(), b.double(), EPS),
        "rms": F.rms_norm(x.double(), x.shape[-1:], w.double(), EPS),
    }
    for name, y in found.items():
        assert y.dtype == dtype
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(y.double(), expected[name], rtol=0, atol=TOLERANCES[dtype] * scale)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_masked_channels_are_not_there_to_the_bit(case: Case, dtype: torch.dtype) -> None:
    x, w, b = case.tensors(dtype)
    old = slice(0, case.num_old)
    alone = norms(x[..., old].contiguous(), mask(case, 0.0)[old], case.num_old, w[old], b[old])
    for name, y in norms(x, mask(case, 0.0), case.num_old, w, b).items():
        assert torch.equal(y[..., old], alone[name])
        assert not y[..., case.num_old :].any()


@every
def test_in_between_they_are_the_formula(case: Case) -> None:
    x, w, b = case.tensors(torch.float64)
    c = mask(case, 0.3)
    mu = (c * x).sum(-1, keepdim=True) / c.sum()
    var = (c * (x - mu) ** 2).sum(-1, keepdim=True) / c.sum()
    found = norms(x, c, case.num_old, w, b)
    torch.testing.assert_close(found["layer"], ((x - mu) / (var + EPS).sqrt() * w + b) * c)
    ms = (c * x * x).sum(-1, keepdim=True) / c.sum()
    torch.testing.assert_close(found["rms"], x / (ms + EPS).sqrt() * w * c)


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_gradients(value: float) -> None:
    case = TINY[0]
    x, w, b = (t.requires_grad_() for t in case.tensors(torch.float64))
    c = mask(case, value)
    assert torch.autograd.gradcheck(lambda *t: masked_layer_norm(t[0], c, case.num_old, t[1], t[2], EPS), (x, w, b))
    assert torch.autograd.gradcheck(lambda *t: masked_rms_norm(t[0], c, case.num_old, t[1], EPS), (x, w))
    if value == 0:
        for y in norms(x, c, case.num_old, w, b).values():
            grads = torch.autograd.grad(y.square().sum(), (x, w, b), allow_unused=True)
            assert all(not g[..., case.num_old :].any() for g in grads if g is not None)


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"x has 8 channels, the mask is of shape \(7,\)"):
        masked_layer_norm(x, torch.ones(7), 4, None, None, EPS)
    for num_old in (0, 9):
        with pytest.raises(ValueError, match=f"num_old={num_old}"):
            masked_rms_norm(x, torch.ones(8), num_old, None, EPS)
