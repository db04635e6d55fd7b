"""Product quantisation's Triton kernels, through Triton's interpreter (some seconds a case), against the others."""

from __future__ import annotations

import pytest
import torch

from sparsetrain.ops.product_quantization import block_histograms, encode
from sparsetrain.ops.product_quantization.cases import TINY, Case
from tests.ops.interpreter import interpreted as interpreted

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("interpreted")]
CASES = pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)


@CASES
@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_codes_equal_the_reference(case: Case, distance: str) -> None:
    x, codebook = case.tensors(torch.float32)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    wanted = encode(x, codebook, distance, backend="reference")
    assert torch.equal(encode(strided, codebook, distance, backend="triton"), wanted)
    assert torch.equal(encode(x.half(), codebook, distance, backend="triton"), encode(x.half(), codebook, distance))


@CASES
@pytest.mark.parametrize("block_tokens", [24])
def test_histograms_equal_the_reference(case: Case, block_tokens: int) -> None:
    x, codebook = case.tensors(torch.float32)
    valid = torch.rand(case.batch, case.tokens, generator=torch.Generator().manual_seed(1)) > 0.3
    for counted in (None, valid):
        wanted = block_histograms(x, codebook, block_tokens, "l1", counted, backend="reference")
        assert torch.equal(block_histograms(x, codebook, block_tokens, "l1", counted, backend="triton"), wanted)


def test_a_block_of_several_tiles_equal_distances_and_nan() -> None:
    x, codebook = Case(name="long", heads=1, codebooks=1, tokens=150, codewords=3).tensors(torch.float32)
    doubled = torch.cat([codebook, codebook], dim=2)
    assert torch.equal(encode(x, doubled, backend="triton"), encode(x, codebook, backend="reference"))
    wanted = block_histograms(x, codebook, 100, backend="reference")
    assert torch.equal(block_histograms(x, codebook, 100, backend="triton"), wanted)
    x[0, 0, 3] = torch.nan
    assert encode(x, codebook, backend="triton").max() < 3


def test_opcheck() -> None:
    from sparsetrain.ops.product_quantization import triton as kernels

    x, codebook = TINY[0].tensors(torch.float32)
    valid = torch.ones(1, 37, dtype=torch.bool)
    torch.library.opcheck(kernels.encode, (x, codebook, "l1"))
    torch.library.opcheck(kernels.histograms, (x, codebook, 16, "l2", valid))
