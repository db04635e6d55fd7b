from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.ops.partial_weight import (
    block_linear,
    blocks_of,
    entries_of,
    partial_weight,
    places_of_blocks,
    put_blocks,
    put_entries,
)
from sparsetrain.ops.partial_weight.cases import REAL, TINY, Case
from sparsetrain.ops.partial_weight.reference import reference_blocks, reference_linear, reference_partial


def values_of(case: Case, weight: Tensor, chosen: Tensor) -> Tensor:
    if case.block is None:
        return entries_of(weight, chosen)
    return blocks_of(weight, case.block).flatten(0, 1)[chosen].contiguous()


def ours(case: Case, x: Tensor, weight: Tensor, values: Tensor, chosen: Tensor, bias: Tensor) -> Tensor:
    if case.block is not None:
        return block_linear(x, weight, values, chosen, bias, transposed=case.transposed)
    chosen_weight = partial_weight(weight, values, chosen)
    return F.linear(x, chosen_weight.t() if case.transposed else chosen_weight, bias)


def reference(case: Case, x: Tensor, weight: Tensor, values: Tensor, chosen: Tensor, bias: Tensor) -> Tensor:
    written = (
        reference_partial(weight, values, chosen)
        if case.block is None
        else reference_blocks(weight, values, chosen, case.block)
    )
    return reference_linear(x, written, bias, case.transposed)


def outputs_and_gradients(way: Any, case: Case, dtype: torch.dtype) -> list[Tensor]:
    x, weight, bias, chosen = case.tensors(dtype)
    leaves = [t.clone().requires_grad_() for t in (x, values_of(case, weight, chosen), bias)]
    y = way(case, leaves[0], weight, leaves[1], chosen, leaves[2])
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=dtype)
    return [y, *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_outputs_and_gradients_are_those_of_the_reference(case: Case) -> None:
    for found, expected in zip(*(outputs_and_gradients(way, case, torch.float64) for way in (ours, reference))):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", REAL, ids=lambda case: case.name)
def test_real_sizes(case: Case) -> None:
    for found, expected in zip(*(outputs_and_gradients(way, case, torch.float32) for way in (ours, reference))):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_what_is_written_is_what_is_read(case: Case) -> None:
    _, weight, _, chosen = case.tensors()
    values = torch.randn_like(values_of(case, weight, chosen))
    before = weight.clone()
    (put_entries if case.block is None else put_blocks)(weight, chosen, values)
    assert torch.equal(values_of(case, weight, chosen), values)
    places = chosen if case.block is None else places_of_blocks(chosen, case.block, tuple(weight.shape))  # type: ignore[arg-type]
    assert torch.equal(entries_of(weight, places), values.flatten())
    rest = torch.ones(weight.numel(), dtype=torch.bool).index_fill_(0, places.long(), False)
    assert torch.equal(weight.flatten()[rest], before.flatten()[rest])


def test_a_weight_used_twice_before_one_backward() -> None:
    _, weight, _, places = TINY[0].tensors()
    values = entries_of(weight, places).requires_grad_()
    x, z = torch.randn(3, 10, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    (
        F.linear(x, partial_weight(weight, values, places)).sum() + (z @ partial_weight(weight, values, places)).sum()
    ).backward()
    dense = weight.clone().requires_grad_()
    (F.linear(x, dense).sum() + (z @ dense).sum()).backward()
    assert dense.grad is not None
    torch.testing.assert_close(values.grad, dense.grad.flatten()[places])


def test_the_weight_is_neither_copied_nor_given_a_gradient() -> None:
    _, weight, _, places = TINY[0].tensors()
    values = entries_of(weight, places).requires_grad_()
    used = partial_weight(weight, values, places)
    assert used.data_ptr() == weight.data_ptr()
    used.sum().backward()
    assert weight.grad is None and values.grad is not None and values.grad.shape == values.shape


@pytest.mark.parametrize("name", ["rows", "tiles"])
def test_under_autocast_gradients_have_the_dtype_of_what_they_are_of(name: str) -> None:
    case = next(case for case in TINY if case.name == name)
    x, weight, bias, chosen = case.tensors(torch.float32)
    leaves = [t.requires_grad_() for t in (x, values_of(case, weight, chosen), bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block_linear(leaves[0], weight, leaves[1], chosen, leaves[2])
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves)


def test_bad_input_is_refused() -> None:
    _, weight, _, places = TINY[0].tensors()
    with pytest.raises(ValueError, match="Give one value a place"):
        partial_weight(weight, torch.zeros(3), places)
    with pytest.raises(ValueError, match="Freeze it"):
        partial_weight(weight.requires_grad_(), entries_of(weight.detach(), places), places)
    with pytest.raises(ValueError, match="does not divide into blocks of 4x4"):
        blocks_of(torch.zeros(6, 8), (4, 4))
