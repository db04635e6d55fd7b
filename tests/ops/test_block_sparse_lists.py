"""What GPU kernels are told of the lists, against the definition pair by pair; FlexAttention's forward on a CPU."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from sparsetrain.core.errors import Unsupported
from sparsetrain.ops.block_sparse_attention import flex, reference
from sparsetrain.ops.block_sparse_attention.cases import TINY, Case
from sparsetrain.ops.block_sparse_attention.lists import block_lists, invert
from sparsetrain.ops.block_sparse_attention.tiles import Geometry
from tests.ops.test_block_sparse_attention import CASES, call, listed, visible


def geometry(case: Case) -> Geometry:
    return Geometry(case.queries, case.num_keys, case.block_q, case.block_k, case.causal, case.window)


def expanded(case: Case) -> Tensor:
    """The lists as backends get them."""
    return case.lists().expand(case.batch, max(case.list_heads, case.kv_heads), -1, -1)


def pairs_of(case: Case, mask: BlockMask, *, inverse: bool) -> Tensor:
    """[b, h, t, s]: what a kernel that walks these lists computes, one block at a time; a pair twice is an error."""
    sides = [(mask.kv_num_blocks, mask.kv_indices, True), (mask.full_kv_num_blocks, mask.full_kv_indices, False)]
    if inverse:
        sides = [(mask.q_num_blocks, mask.q_indices, True), (mask.full_q_num_blocks, mask.full_q_indices, False)]
    pairs = torch.zeros(case.batch, case.heads, case.queries, case.num_keys, dtype=torch.int32)
    for (counts, ids, partial), b, h in (
        (s, b, h) for s in sides for b in range(case.batch) for h in range(case.heads)
    ):
        counts, ids = (x.expand(case.batch, case.heads, *x.shape[2:])[b, h] for x in (counts, ids))
        for owner in range(len(counts)):
            for other in ids[owner, : counts[owner]].tolist():
                i, j = (other, owner) if inverse else (owner, other)
                rows = torch.arange(i * case.block_q, min((i + 1) * case.block_q, case.queries))
                keys = torch.arange(j * case.block_k, min((j + 1) * case.block_k, case.num_keys))
                seen = mask.mask_mod(torch.tensor(b), torch.tensor(h), rows[:, None], keys) if partial else 1
                pairs[b, h, rows[:, None], keys] += seen
    return pairs


@CASES
def test_flex_lists_hold_every_visible_pair_once_in_both_directions(case: Case) -> None:
    wanted = (visible(case) & listed(case, case.lists())).int()
    mask = flex.block_mask(expanded(case), case.segments(), geometry(case), case.heads)
    assert torch.equal(pairs_of(case, mask, inverse=False), wanted)
    assert torch.equal(pairs_of(case, mask, inverse=True), wanted)


@CASES
def test_full_blocks_are_those_with_every_pair_and_none_is_visited_in_vain(case: Case) -> None:
    lists, geo = expanded(case), geometry(case)
    found, segments = block_lists(lists, case.segments(), geo), case.segments()
    pairs = visible(case)
    for name, side in (("full", found.full), ("partial", found.partial)):
        counts, ids = (x.expand(case.batch, lists.shape[1], *x.shape[2:]) for x in side)
        for b, head, i in (
            (b, h, i) for b in range(case.batch) for h in range(lists.shape[1]) for i in range(geo.num_query_blocks)
        ):
            inside = ids[b, head, i, : counts[b, head, i]].tolist()
            assert inside == sorted(set(inside)) and set(inside) <= set(lists[b, head, i].tolist())
            for j in inside:
                block = pairs[
                    b, 0, i * case.block_q : (i + 1) * case.block_q, j * case.block_k : (j + 1) * case.block_k
                ]
                whole = block.shape[1] == case.block_k and bool(block.all())
                assert whole if name == "full" else not whole
                assert bool(block.any()) or segments is not None  # segments are compared by their range alone


def test_expanded_lists_are_worked_out_once_and_segments_make_them_differ() -> None:
    case = next(case for case in TINY if case.name == "gqa")
    lists = case.lists()[:1, :1].expand(case.batch, case.kv_heads, -1, -1)
    assert block_lists(lists, None, geometry(case)).full.ids.shape[:2] == (1, 1)
    segments = torch.ones(case.batch, case.num_keys, dtype=torch.int64)
    assert block_lists(lists, segments, geometry(case)).full.ids.shape[:2] == (case.batch, 1)


def test_the_inverse_is_sorted_and_empty_lists_have_an_empty_one() -> None:
    case = next(case for case in TINY if case.name == "odd")
    geo = geometry(case)
    inverse = invert(block_lists(expanded(case), None, geo).full, geo.num_key_blocks)
    for head in range(case.list_heads):
        bounds = inverse.offsets[0, head].tolist()
        rows = [inverse.rows[0, head, a:b].tolist() for a, b in pairwise(bounds)]
        assert all(row == sorted(row) for row in rows) and any(len(row) > 1 for row in rows)
    nothing = torch.full((1, 1, geo.num_query_blocks, 0), 0)
    mask = flex.block_mask(nothing, None, geo, case.heads)
    assert int(mask.q_num_blocks.sum()) == int(mask.full_kv_num_blocks.sum()) == 0


@pytest.mark.parametrize("name", ["gqa", "packed"])
def test_no_list_is_read_on_the_host(name: str) -> None:
    """Tensors without values become lists: whoever asks for a value fails."""
    case = next(case for case in TINY if case.name == name)
    lists, segments = expanded(case), case.segments()
    with FakeTensorMode() as mode:
        fake = None if segments is None else mode.from_tensor(segments)
        mask = flex.block_mask(mode.from_tensor(lists), fake, geometry(case), case.heads)
    wide = flex.block_mask(lists, segments, geometry(case), case.heads)
    assert [x.shape for x in (mask.kv_indices, mask.q_indices)] == [x.shape for x in (wide.kv_indices, wide.q_indices)]


def test_no_length_compiles_anew() -> None:
    """Lengths that no block divides, other lists, other segments: one compilation for each rule of visibility."""
    counter = CompileCounter()
    run = torch.compile(flex_attention, dynamic=True, backend=counter)
    torch._dynamo.reset()
    packed = next(case for case in TINY if case.name == "packed")
    for queries in (77, 93, 120):
        for case in (replace(packed, queries=queries, packed=False), replace(packed, queries=queries)):
            q, k, v = (x[..., None, :].expand(-1, -1, -1, 2, -1).flatten(3) for x in case.tensors(torch.float32))
            mask = flex.block_mask(expanded(case), case.segments(), geometry(case), case.heads)
            with torch.no_grad():
                run(q, k, v, block_mask=mask)
    assert counter.frame_count == 2


def test_flex_says_what_it_cannot_do() -> None:
    case = TINY[0]
    q, k, v = case.tensors(torch.float32)
    with pytest.raises(Unsupported, match="'flex': FlexAttention gives no gradient and no log-sum-exp on cpu"):
        call(case, q, k, v, case.lists(), "flex")


@pytest.mark.slow  # the C++ compiler runs for each rule of visibility
@pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention's CPU form is compiled by g++")
@pytest.mark.parametrize("name", ["causal", "gqa", "packed", "window_bidirectional", "chunk"])
def test_compiled_forward_equals_the_reference(name: str) -> None:
    case = replace(next(case for case in TINY if case.name == name), head_dim=16)
    q, k, v = case.tensors(torch.float32)
    wanted, _ = reference.attend(q, k, v, expanded(case), case.segments(), geometry(case), 0.25)
    mask = flex.block_mask(expanded(case), case.segments(), geometry(case), case.heads)
    with torch.no_grad():
        found = flex.compiled()(q, k, v, block_mask=mask, enable_gqa=case.heads != case.kv_heads)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
