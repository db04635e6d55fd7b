"""Block-sparse attention on a GPU: every backend that runs there against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsetrain.ops.block_sparse_attention import block_sparse_attention
from sparsetrain.ops.block_sparse_attention.cases import TOLERANCE, Case
from tests.ops.test_block_sparse_attention import assert_near, with_gradients

CASES = (
    Case(name="causal", heads=8, queries=1024, head_dim=64, block_q=128, block_k=128, kept_keys=256),
    Case(
        name="gqa", batch=2, heads=8, queries=1000, head_dim=128, block_q=128, block_k=128, kept_keys=384, packed=True
    ),
    Case(name="window", queries=777, head_dim=64, block_q=128, block_k=128, kept_keys=384, window=300, causal=False),
    Case(name="small", queries=777, head_dim=64, block_q=64, block_k=32, kept_keys=128),
)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["flex", "triton"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_reference(case: Case, backend: str, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if backend == "flex" and case.block_k % 128:
        pytest.skip("FlexAttention's blocks are multiples of 128 tokens")
    tensors, segments = case.tensors(dtype), case.segments()

    def run(device: str, name: str, *x: Tensor) -> tuple[Tensor, ...]:
        return block_sparse_attention(
            *(y.to(device) for y in x),
            case.lists().to(device),
            block_q=case.block_q,
            block_k=case.block_k,
            causal=case.causal,
            window=case.window,
            segments_bs=None if segments is None else segments.to(device),
            return_lse=True,
            backend=name,
        )

    wanted = with_gradients(lambda *x: run("cpu", "reference", *x), tuple(x.double() for x in tensors))
    found = with_gradients(lambda *x: tuple(y.cpu() for y in run("cuda", backend, *x)), tensors)
    # FlexAttention multiplies fp32 in TF32, whose tolerance is that of fp16
    allowed = TOLERANCE[torch.float16 if dtype == torch.float32 and backend == "flex" else dtype]
    assert_near(found, wanted, allowed)
