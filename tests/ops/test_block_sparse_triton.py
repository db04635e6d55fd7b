"""Block-sparse attention's Triton kernels against the reference, through Triton's interpreter: some seconds a case."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sparsetrain.core.errors import Unsupported
from sparsetrain.ops.block_sparse_attention import block_sparse_attention
from sparsetrain.ops.block_sparse_attention.cases import TINY, TOLERANCE, Case
from tests.ops.interpreter import interpreted as interpreted
from tests.ops.test_block_sparse_attention import CASES, assert_near, call, with_gradients
from tests.ops.test_block_sparse_lists import expanded, geometry

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("interpreted")]


@CASES
def test_equals_the_reference_forward_and_every_gradient(case: Case) -> None:
    tensors, lists = case.tensors(torch.float32), case.lists()
    wanted = with_gradients(lambda *x: call(case, *x, lists, "reference"), tuple(x.double() for x in tensors))
    assert_near(with_gradients(lambda *x: call(case, *x, lists, "triton"), tensors), wanted, TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["odd", "mqa", "bidirectional"])
def test_half_precision(name: str) -> None:
    case = next(case for case in TINY if case.name == name)
    tensors, lists = case.tensors(torch.float16), case.lists()
    wanted = with_gradients(lambda *x: call(case, *x, lists, "reference"), tuple(x.double() for x in tensors))
    found = with_gradients(lambda *x: call(case, *x, lists, "triton"), tensors)
    assert all(x.dtype == torch.float16 for x in (found[0], *found[2:])) and found[1].dtype == torch.float32
    assert_near(found, wanted, TOLERANCE[torch.float16])


def test_blocks_of_several_tiles_and_channels_that_are_no_power_of_two() -> None:
    """96 x 160 tokens divide into tiles of 32 alone; 20 channels are computed as 32."""
    case = Case(name="parts", queries=200, head_dim=20, block_q=96, block_k=160, kept_keys=160, heads=2, kv_heads=1)
    case = replace(case, list_heads=1)
    tensors, lists = case.tensors(torch.float32), case.lists()
    wanted = with_gradients(lambda *x: call(case, *x, lists, "reference"), tuple(x.double() for x in tensors))
    assert_near(with_gradients(lambda *x: call(case, *x, lists, "triton"), tensors), wanted, TOLERANCE[torch.float32])


def test_rows_without_a_visible_key_are_exactly_zero() -> None:
    case = Case(name="empty", queries=40, block_q=8, block_k=8, kept_keys=16)
    lists = case.lists()
    lists[:, :, 1] = -1
    lists[:, :, 2] = torch.tensor([4, -1])
    out, lse, dq, dk, dv = with_gradients(lambda *x: call(case, *x, lists, "triton"), case.tensors(torch.float32))
    assert (out[:, :, 8:24] == 0).all() and (dq[:, :, 8:24] == 0).all() and lse[:, :, 8:24].isneginf().all()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))


def test_strides_do_not_matter_and_no_uninitialised_memory_is_read() -> None:
    case = next(case for case in TINY if case.name == "gqa")
    tensors, lists = case.tensors(torch.float32), case.lists()[:1]
    wanted = with_gradients(lambda *x: call(case, *x, lists, "triton"), tensors)
    strided = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors)
    torch.use_deterministic_algorithms(True)  # fills every empty() with NaN
    try:
        found = with_gradients(lambda *x: call(case, *x, lists, "triton"), strided)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted))


def test_the_gradient_of_lse_alone() -> None:
    case = TINY[0]
    tensors, lists = case.tensors(torch.float32), case.lists()
    q, k, v = tensors
    wanted = with_gradients(lambda *x: call(case, *x, v.double(), lists, "reference")[1], (q.double(), k.double()))
    found = with_gradients(lambda *x: call(case, *x, lists, "triton")[1], tensors)
    assert_near(found[:-1], wanted, 1e-5)
    assert found[-1].abs().max() == 0


@pytest.mark.parametrize("name", ["one_token", "packed_bidirectional"])
def test_opcheck(name: str) -> None:
    from sparsetrain.ops.block_sparse_attention import triton as kernels
    from sparsetrain.ops.block_sparse_attention.lists import block_lists

    case = next(case for case in TINY if case.name == name)
    case = replace(case, queries=min(case.queries, 20), kept_keys=8)
    geo, segments = geometry(case), case.segments()
    lists = block_lists(expanded(case), segments, geo)
    sizes = (geo.block_q, geo.block_k, geo.causal, geo.window, 0.3)
    tensors = [x.requires_grad_() for x in case.tensors(torch.float32)]
    segments = None if segments is None else segments.int()
    torch.library.opcheck(kernels.attention_op, (*tensors, *lists.full, *lists.partial, segments, *sizes))
    plain = [x.detach() for x in tensors]
    lse = torch.zeros(plain[0].shape[:3])
    rest = (*lists.full, *lists.partial, segments, *sizes)
    torch.library.opcheck(kernels.backward_op, (*plain, plain[0], lse, lse, *rest))


def test_what_the_kernels_refuse() -> None:
    case = TINY[0]
    with pytest.raises(Unsupported, match=r"not torch\.float64 of 8"):
        call(case, *case.tensors(torch.float64), case.lists(), "triton")
    q, k, v = case.tensors(torch.float32)
    # interpreted kernels are never what `auto` takes
    on_cpu = block_sparse_attention(q, k, v, case.lists(), block_q=16, block_k=16, causal=True)
    assert torch.equal(on_cpu, call(case, q, k, v, case.lists(), "torch")[0])


def test_wide_heads_take_fewer_queries_at_a_time_where_registers_would_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    """dK and dV on Hopper, in half precision."""
    from sparsetrain.ops.block_sparse_attention import triton as kernels

    for capability, itemsize, width, rows in ((9, 2, 128, 32), (9, 2, 64, 64), (9, 4, 128, 64), (8, 2, 128, 64)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: (found, 0))
        q = SimpleNamespace(is_cuda=True, device=None, itemsize=itemsize, shape=(1, 2, 256, width))
        assert kernels._kv_rows(q) == rows  # type: ignore[arg-type]
