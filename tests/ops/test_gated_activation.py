"""The gated activation: value and gradients in fp64, what is saved, and layouts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparsetrain.core.errors import Unsupported
from sparsetrain.ops.gated_activation import ACTIVATIONS, gated_activation
from sparsetrain.ops.gated_activation.cases import TINY, TOLERANCE, Case


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def column_major(tokens: int, channels: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Laid out as the result of a 2:4 product."""
    return draw(channels, tokens, dtype=dtype).t()


def test_the_formula_at_a_point() -> None:
    value, gate = 3.0, -0.7
    h = torch.tensor([value, gate], dtype=torch.float64)
    inner = math.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))
    assert float(gated_activation(h)) == pytest.approx(value * 0.5 * gate * (1 + inner), rel=1e-12)
    assert float(gated_activation(h, "silu")) == pytest.approx(value * gate / (1 + math.exp(-gate)), rel=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_equals_the_reference_forward_and_backward(activation: str, case: Case) -> None:
    found, expected = [], []
    for backend, kept in (("torch", found), ("reference", expected)):
        h, dy = case.tensors(torch.float64)
        y = gated_activation(h.requires_grad_(), activation, backend=backend)
        y.backward(dy)
        kept += [y, h.grad]
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=TOLERANCE[torch.float64], atol=TOLERANCE[torch.float64])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("columns", [False, True])
def test_gradcheck(activation: str, columns: bool) -> None:
    h = (column_major(3, 8) if columns else draw(3, 8)).requires_grad_()
    assert torch.autograd.gradcheck(lambda h: gated_activation(h, activation), (h,))


def test_column_major_in_gives_column_major_out_forward_and_backward() -> None:
    h = column_major(12, 8).requires_grad_()
    y = gated_activation(h)
    assert y.t().is_contiguous()
    (dh,) = torch.autograd.grad(y, h, torch.ones_like(y))
    assert dh.t().is_contiguous()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_only_the_projection_is_saved(activation: str) -> None:
    saved: list[Tensor] = []
    h = draw(4, 8).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        gated_activation(h, activation)
    assert [t.data_ptr() for t in saved] == [h.data_ptr()]


def test_bf16_is_no_worse_than_plain_pytorch() -> None:
    h = draw(64, 128, dtype=torch.float32)
    exact = gated_activation(h, backend="reference")
    errors = [(gated_activation(h.bfloat16(), backend=b).float() - exact).norm() for b in ("torch", "reference")]
    assert errors[0] <= errors[1] * 1.01


def test_bad_input_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="has 7 channels"):
        gated_activation(draw(2, 7))
    with pytest.raises(ValueError, match="activation='gelu' is unknown"):
        gated_activation(draw(2, 8), "gelu")
    with pytest.raises(Unsupported, match="element-wise"):
        gated_activation(draw(2, 8), backend="triton")
