"""Attention of selected rows by libraries and by our kernels, beside the tiles in plain PyTorch; and who is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsetrain.core import backend
from sparsetrain.core.errors import Unsupported
from sparsetrain.ops.selected_rows import KeyValues, Rows, choice, selected_attention
from sparsetrain.ops.selected_rows.cases import TINY, Case
from sparsetrain.ops.selected_rows.flex import block_lists

EMPTY = Case(name="one_sample_without_rows", heads=4, kv_heads=2, counts=(9, 0))
SINGLE = Case(name="one_row", heads=4, kv_heads=2, counts=(1, 1), tokens=19)
WIDE = Case(name="other_widths", heads=2, kv_heads=1, counts=(21, 3), head_dim=24, tokens=41)
CASES = (*TINY, EMPTY, SINGLE, WIDE)


def problem(case: Case, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], KeyValues, Rows]:
    """Selected queries, keys and values with gradient; what they see; which they are."""
    draw = torch.Generator().manual_seed(3)
    t, segments = case.tokens, case.segment_ids()
    chosen = [torch.randperm(t, generator=draw)[:n] for n in case.counts]
    if segments is not None:  # padding is never selected
        chosen = [p[segments[i, p] > 0] for i, p in enumerate(chosen)]
    rows = Rows.of(chosen, t)
    q, k, v = (
        torch.randn(2, n, t, case.head_dim, generator=draw).to(dtype)
        for n in (case.heads, case.kv_heads, case.kv_heads)
    )
    selected = [rows.gather(x.transpose(1, 2)).transpose(1, 2).clone().requires_grad_() for x in (q, k, v)]
    return selected, KeyValues(k, v, case.causal, 0.4, segments, case.window), rows


def run(
    selected: list[Tensor], e: KeyValues, rows: Rows, backend: str, known: bool = False, context: bool = False
) -> list[Tensor]:
    """Output of used slots, and the gradients."""
    more = (e.k_bgsd.clone().requires_grad_(), e.v_bgsd.clone().requires_grad_()) if context else None
    values = selected_attention(*selected, e, rows, backend="torch").detach() if known else None
    out = selected_attention(*selected, e, rows, known=values, context=more, backend=backend)
    used = torch.ones(rows.shape, dtype=torch.bool) if rows.used_bk is None else rows.used_bk
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    weight = weight * used[:, None, :, None]
    return [out.detach() * used[:, None, :, None], *torch.autograd.grad(out, [*selected, *(more or ())], weight)]


def off(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error, relative to the largest entry."""
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-3))
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_flex_attention_equals_the_tiles(case: Case) -> None:
    """The forward: on a CPU it has no backward."""
    (q, k, v), e, rows = problem(case)
    found, expected = (
        selected_attention(q.detach(), k.detach(), v.detach(), e, rows, backend=name) for name in ("flex", "torch")
    )
    assert off([found], [expected]) < 2e-5
    with pytest.raises(Unsupported, match="no backward on a CPU"):
        selected_attention(q, k, v, e, rows, backend="flex")


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_definition_equals_the_tiles(case: Case, context: bool) -> None:
    """By name it runs anywhere, so that a whole step can be compared with it."""
    given = problem(case, torch.float64)
    found, expected = (run(*given, backend=name, context=context) for name in ("reference", "torch"))
    assert off(found, expected) < 1e-10


@pytest.mark.parametrize("block", [4, 16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_block_lists_equal_brute_force(case: Case, block: int) -> None:
    """No block with a visible pair is missing, and a block that runs without the mask is visible whole. Windows and
    packed rows may list blocks that no pair needs."""
    _, e, rows = problem(case)
    (b, k), t = rows.shape, case.tokens
    distance = rows.index_bk[:, :, None] - torch.arange(t)
    seen = (distance >= 0) if case.causal else torch.ones_like(distance, dtype=torch.bool)
    if case.window is not None:
        seen = seen & (distance.abs() < case.window)
    seen = seen & (torch.arange(k)[None, :, None] < torch.tensor(rows.counts)[:, None, None])
    if e.segments_bs is not None:
        looks = e.segments_bs.gather(1, rows.index_bk)
        seen = seen & (looks[:, :, None] == e.segments_bs[:, None]) & (e.segments_bs[:, None] > 0)
    lists = block_lists(rows.index_bk, rows.counts_b, t, case.causal, case.window, e.segments_bs, block)
    partial, whole = (_as_sets(*lists[i : i + 2]) for i in (0, 2))
    for sample in range(b):
        for qi in range(-(-k // block)):
            for ki in range(-(-t // block)):
                at = (sample, slice(qi * block, (qi + 1) * block), slice(ki * block, (ki + 1) * block))
                # rows that are not there are not written; keys that are not there must be masked
                all_of_it = seen[at].shape[1] == block and bool(seen[at].all())
                assert (ki in whole[sample][qi]) == (all_of_it and e.segments_bs is None)
                listed, needed = ki in partial[sample][qi] or ki in whole[sample][qi], bool(seen[at].any())
                exact = case.window is None and e.segments_bs is None
                assert listed == needed if exact else listed >= needed
                assert not (ki in partial[sample][qi] and ki in whole[sample][qi])


def _as_sets(numbers: Tensor, indices: Tensor) -> list[list[set[int]]]:
    assert numbers.dtype == indices.dtype == torch.int32
    found = [
        [entries[:n].tolist() for n, entries in zip(row_n.tolist(), row, strict=True)]
        for row_n, row in zip(numbers[:, 0], indices[:, 0], strict=True)
    ]
    assert all(entries == sorted(entries) for sample in found for entries in sample)
    return [[set(entries) for entries in sample] for sample in found]


def test_who_is_chosen_and_why_not_the_others() -> None:
    (q, _, _), e, rows = problem(TINY[0])
    found = choice.available(q, e, rows, trains_others=False)
    assert next(iter(found)) == "torch" and found["torch"] is None
    assert found["sdpa"] == "less than 75% of the stretches that hold the selected rows is selected"
    with pytest.raises(Unsupported, match="less than 75%"):
        selected_attention(*problem(TINY[0])[0], e, rows, backend="sdpa")


@pytest.mark.parametrize(
    ("installed", "device", "dtype", "width", "reason"),
    [
        (False, "cpu", torch.float32, 64, "triton is not installed"),
        (True, "cpu", torch.float32, 64, "are for a GPU"),
        (True, "mps", torch.float32, 64, "tensors are on mps"),
    ],
)
def test_reasons_against_the_kernels(
    installed: bool, device: str, dtype: torch.dtype, width: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "has_triton", lambda: installed)
    assert reason in str(choice.no_kernels(torch.device(device), dtype, width))


def test_kernels_that_fail_or_are_wrong_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler's error and a wrong number are reasons, and no crash in the middle of a run."""
    form = (torch.device("cpu"), torch.float32, 16, True, False, False, False)

    class Broken:
        @staticmethod
        def rows_forward(*_: Any) -> Any:
            raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(choice, "kernels", lambda: Broken)
    assert "out of resource: shared memory" in str(choice.fails.__wrapped__(*form))
    monkeypatch.setattr(choice, "compare_with_tiles", lambda *_: 0.3)
    assert "off by 0.3" in str(choice.fails.__wrapped__(*form))
    monkeypatch.setattr(choice, "compare_with_tiles", lambda *_: 1e-6)
    assert choice.fails.__wrapped__(*form) is None
