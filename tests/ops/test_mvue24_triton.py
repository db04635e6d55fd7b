"""MVUE's Triton kernel, through Triton's interpreter, against the other backends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsetrain.ops.mvue24 import mvue24
from sparsetrain.ops.mvue24.cases import TINY, Case
from tests.ops.interpreter import interpreted as interpreted

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("interpreted")]


def drawn(x: Tensor, dim: int, backend: str) -> Tensor:
    return mvue24(x, dim, generator=torch.Generator().manual_seed(1), backend=backend)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_draws_equal_the_other_backends(case: Case, dtype: torch.dtype) -> None:
    x = case.tensor(dtype)
    found = drawn(x, case.dim, "triton")
    assert found.dtype == dtype
    for backend in ("torch", "reference"):
        other = drawn(x, case.dim, backend)
        assert torch.equal(found != 0, other != 0)
        torch.testing.assert_close(found, other)


@pytest.mark.parametrize("dim", [0, 1])
def test_transposed_gradients_are_drawn_as_they_lie(dim: int) -> None:
    x = TINY[0].tensor(torch.float32)
    found = drawn(x.t().contiguous().t(), dim, "triton")
    assert found.stride() == (1, x.shape[0])
    torch.testing.assert_close(found, drawn(x, dim, "torch"))


def test_groups_along_the_middle_and_an_incomplete_one() -> None:
    x = torch.randn(3, 11, 5, generator=torch.Generator().manual_seed(0))
    found = drawn(x, 1, "triton")
    assert torch.equal(found[:, 8:], x[:, 8:])
    torch.testing.assert_close(found, drawn(x, 1, "torch"))


def test_one_large_entry_in_a_group_does_not_cancel() -> None:
    x = torch.tensor([1e4, 0, 0, 0, 3e4, 1e-3, 0, -1e-3, 1.0, 1e-9, 1e9, 0]).view(-1, 4).t().contiguous()
    y = drawn(x, 0, "triton")
    assert y.isfinite().all()
    torch.testing.assert_close(y[:, 0], x[:, 0], rtol=1e-3, atol=0)


def test_opcheck() -> None:
    from sparsetrain.ops.mvue24.triton import drawn as op

    torch.library.opcheck(op, (torch.randn(1, 9, 3), torch.rand(2), torch.rand(3), torch.tensor(1e-7)))
