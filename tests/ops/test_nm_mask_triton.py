"""The masks' Triton kernels, through Triton's interpreter, against sorting and against brute force."""

from __future__ import annotations

import pytest
import torch

from sparsetrain.ops.nm_mask import nm_mask, transposable_mask
from sparsetrain.ops.nm_mask.cases import TINY, Case
from tests.ops.interpreter import interpreted as interpreted

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("interpreted")]


def weights(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
@pytest.mark.parametrize("by", ["magnitude", "value"])
def test_nm_masks_equal_the_reference(case: Case, by: str) -> None:
    w, form = case.tensor(), {"keep": case.keep, "group": case.group, "dim": case.dim, "by": by}
    wanted = nm_mask(w, **form, backend="reference")
    assert torch.equal(nm_mask(w, **form, backend="triton"), wanted)
    assert torch.equal(nm_mask(w.mT.contiguous().mT, **form, backend="triton"), wanted)


def test_groups_of_three_in_half_precision() -> None:
    w = weights(5, 9, dtype=torch.float16)
    assert torch.equal(nm_mask(w, 1, 3, backend="triton"), nm_mask(w, 1, 3, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_transposable_masks_equal_brute_force_ties_included(dtype: torch.dtype) -> None:
    w = weights(12, 20, dtype=dtype)
    for x in (w, w.round(), w.t(), torch.zeros_like(w)):
        assert torch.equal(transposable_mask(x, backend="triton"), transposable_mask(x, backend="reference"))


def test_more_tiles_than_a_program_has() -> None:
    w = weights(4, 4 * 130)
    assert torch.equal(transposable_mask(w, backend="triton"), transposable_mask(w, backend="reference"))


def test_patterns_that_fp32_cannot_tell_apart() -> None:
    """Every pattern keeps 68 of the tile 1..16, and here those with the first entry 2⁻²⁰ more."""
    tile = torch.arange(1.0, 17).view(4, 4)
    tile[0, 0] += 2.0**-20
    wanted = transposable_mask(tile, backend="reference")
    assert wanted[0, 0] and torch.equal(transposable_mask(tile, backend="triton"), wanted)


def test_opcheck() -> None:
    from sparsetrain.ops.nm_mask import triton as kernels

    torch.library.opcheck(kernels.transposable, (weights(8, 12),))
    torch.library.opcheck(kernels.ranked, (weights(8, 12), 2, 4, 0, True))
