"""The Monarch linear's Triton kernel against the reference, through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from sparsetrain.ops.monarch_linear import monarch_linear
from sparsetrain.ops.monarch_linear.cases import TINY, TOLERANCE, Case
from tests.ops.interpreter import interpreted as interpreted
from tests.ops.test_monarch_linear import far, results

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("interpreted")]


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
@pytest.mark.parametrize("columns", [False, True])
def test_equals_the_reference_in_value_and_every_gradient(case: Case, columns: bool) -> None:
    wanted = results(case, torch.float32, backend="reference")
    for found, exact in zip(results(case, torch.float32, backend="triton", columns=columns), wanted, strict=True):
        assert found.shape == exact.shape and far(found, exact) <= TOLERANCE[torch.float32]


def test_half_precision() -> None:
    case = TINY[3]
    plain = results(case, torch.float16, backend="torch")
    for found, other in zip(results(case, torch.float16, backend="triton"), plain, strict=True):
        assert found.dtype == torch.float16 and far(found.float(), other.float()) <= 1e-3


def test_rows_come_row_by_row_without_a_copy_and_no_uninitialised_memory_is_read() -> None:
    x, right, left, bias, dy = TINY[1].tensors(torch.float32)
    leaves = [t.requires_grad_() for t in (x, right, left, bias) if t is not None]
    torch.use_deterministic_algorithms(True)  # fills every empty() with NaN
    try:
        y = monarch_linear(x, right, left, bias, backend="triton")
        grads = torch.autograd.grad(y, leaves, dy)
    finally:
        torch.use_deterministic_algorithms(False)
    assert y.is_contiguous() and y.isfinite().all() and all(grad.isfinite().all() for grad in grads)


def test_products_of_several_tiles() -> None:
    case = Case(name="tiles", rows=(70,), outputs=300, inputs=140, blocks_in=2, blocks_out=2, rank=35)
    wanted = results(case, torch.float32, backend="reference")
    for found, exact in zip(results(case, torch.float32, backend="triton"), wanted, strict=True):
        assert far(found, exact) <= TOLERANCE[torch.float32]


def test_opcheck() -> None:
    from sparsetrain.ops.monarch_linear.triton import block_products

    a, b, bias = torch.randn(2, 3, 5), torch.randn(2, 5, 4), torch.randn(2, 3)
    torch.library.opcheck(block_products, (a, b, bias, torch.zeros(2, 3, 4)))
