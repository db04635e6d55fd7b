"""Selected rows that stand together, as token selection draws them, by PyTorch's attention; beside plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparsetrain import TokenSelection
from sparsetrain.core.backend import planning_for, use_backend
from sparsetrain.core.errors import Unsupported
from sparsetrain.methods.token_selection.policies import Batch, draw
from sparsetrain.ops.selected_rows import KeyValues, Rows, choice, selected_attention_reference
from sparsetrain.ops.selected_rows.planned import planned_attention, planned_attention_backward
from sparsetrain.ops.selected_rows.runs import Run, collected, run_of, spread
from tests.ops.test_selected_rows_backends import off, run

TARGETS: dict[str, Any] = {"pool": "targets"}
DRAWS: dict[str, dict[str, Any]] = {
    "a tenth": {"keep_ratio": 0.1, **TARGETS},  # 13 of 128: the first token and 12 of 13 targets
    "all targets": {"keep_ratio": 0.1, "keep_all_targets": True, **TARGETS},
    "near": {"keep_ratio": 0.3, "keep_all_targets": True, "context": "near", **TARGETS},
    "no first": {"keep_ratio": 0.1, "always_keep": (), **TARGETS},
    "last": {"keep_ratio": 0.2, "context": "near", "always_keep": ("first", "last"), **TARGETS},
    "prefix": {"keep_ratio": 0.3, "policy": "prefix"},
}
TOKENS = 128


def drawn(chosen: dict[str, Any], lengths: tuple[int, ...] = (TOKENS, TOKENS), step: int = 0) -> tuple[Rows, Tensor]:
    """The draw of rows whose last tenth are targets, padded on the right to 128 tokens; segments int [b, t]."""
    ids = torch.randint(1000, (len(lengths), TOKENS), generator=torch.Generator().manual_seed(step))
    mask = torch.arange(TOKENS) < torch.tensor(lengths)[:, None]
    target = mask & (torch.arange(TOKENS) >= torch.tensor(lengths)[:, None] - 13)
    given = {"input_ids": ids, "labels": torch.where(target, ids, -100), "attention_mask": mask.long()}
    return draw(TokenSelection(**chosen), Batch.of(given, causal=True), step=step), mask.to(torch.int32)


def problem(rows: Rows, heads: int, dtype: torch.dtype) -> tuple[list[Tensor], KeyValues]:
    """q [b, h, t, d], k and v [b, g, t, d] of all rows; of these the selected ones with gradient."""
    draw = torch.Generator().manual_seed(3)
    b, t = rows.shape[0], rows.num_tokens
    q, k, v = (torch.randn(b, n, t, 8, generator=draw, dtype=dtype) for n in (heads, 2, 2))
    selected = [rows.gather(x.transpose(1, 2)).transpose(1, 2).clone().requires_grad_() for x in (q, k, v)]
    return [q, *selected], KeyValues(k, v, True, 0.4)


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("name", DRAWS)
def test_the_rows_that_are_drawn_are_runs(name: str, step: int) -> None:
    rows, _ = drawn(DRAWS[name], step=step)
    assert rows.run is not None
    assert (rows.run.end < TOKENS) == (name != "last"), "the last token predicts nothing and is seldom drawn"
    assert choice.no_run(torch.zeros(2, 2, rows.shape[1], 8), problem(rows, 2, torch.float32)[1], rows) is None
    scattered, _ = drawn({"keep_ratio": 0.3}, step=step)
    assert scattered.run is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("form", ["", "known", "context"])
@pytest.mark.parametrize("lengths", [(128, 128), (128, 127)])
@pytest.mark.parametrize("name", DRAWS)
def test_pytorchs_attention_of_drawn_rows(
    name: str, lengths: tuple[int, int], form: str, heads: int, dtype: torch.dtype
) -> None:
    """Output and every gradient, beside the tiles; with right padding, samples' rows end at different places."""
    rows, segments = drawn(DRAWS[name], lengths)
    (_, *selected), e = problem(rows, heads, dtype)
    if min(lengths) < TOKENS:
        e = replace(e, segments_bs=segments, looks_at_bt=segments)
    ways = {"known": form == "known", "context": form == "context"}
    found = run(selected, e, rows, "sdpa", **ways)
    assert off(found, run(selected, e, rows, "torch", **ways)) < (1e-12 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("trains_others", [False, True])
@pytest.mark.parametrize("name", DRAWS)
def test_pytorchs_attention_of_drawn_rows_is_the_definition(name: str, trains_others: bool) -> None:
    """Beside where(selected, x, x.detach()), in fp64: queries, and keys and values by token."""
    rows, _ = drawn(DRAWS[name])
    (q, *selected), e = problem(rows, 4, torch.float64)
    found = run(selected, e, rows, "sdpa", context=trains_others)
    every = [x.clone().requires_grad_() for x in (q, e.k_bgsd, e.v_bgsd)]
    keys_bt = torch.ones_like(rows.selected_bt) if trains_others else rows.selected_bt
    out = selected_attention_reference(*every, keys_bt, causal=True, scale=0.4)
    here = rows.gather(out.transpose(1, 2)).transpose(1, 2)
    weight = torch.randn(here.shape, generator=torch.Generator().manual_seed(7)).double()
    dq, dk, dv = torch.autograd.grad(here, every, weight)
    expected = [here.detach(), *(rows.gather(x.transpose(1, 2)).transpose(1, 2) for x in (dq, dk, dv))]
    if trains_others:
        expected += [x.masked_fill(rows.selected_bt[:, None, :, None], 0) for x in (dk, dv)]
    assert off(found, expected) < 1e-12


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize(
    "positions",
    [
        [range(25, 37)] * 2,
        [range(25, 34)] * 2,
        [[0, *range(20, 37)]] * 2,
        [range(5)] * 2,
        [range(37)] * 2,
        [[0, 8, 9, 10, 12, 13]],
        [range(20, 30), range(21, 31)],
        [[0, 1, *range(20, 30)], [0, 1, *range(20, 29)]],
        [range(9), range(9), range(9), []],
    ],
)
def test_pytorchs_attention_of_stretches(positions: Any, heads: int) -> None:
    rows = Rows.of(positions, 37)
    (_, *selected), e = problem(rows, heads, torch.float64)
    for context in (False, True):
        found, expected = (run(selected, e, rows, name, context=context) for name in ("sdpa", "torch"))
        assert off(found, expected) < 1e-12


def test_rows_know_their_run() -> None:
    assert Rows.of([[7, 8, 9], [7, 8, 9]], 10).run == Run(0, 7, 10, True)
    assert Rows.of([[0, 7, 8]], 10).run == Run(1, 7, 9, True)
    assert Rows.of([[0, 1, 2]], 10).run == Run(0, 0, 3, True)
    assert Rows.of([range(10)], 10).run == Run(0, 0, 10, True)
    assert Rows.of([[0, 6, 7, 9]], 10).run == Run(1, 6, 10, False)
    assert Rows.of([[0, 6, 9]], 10).run is None
    assert Rows.of([[6, 7, 8, 9], [7, 8, 9]], 10).run == Run(0, 6, 10, False)
    assert Rows.of([[0, 7, 8], [5, 6, 7, 8]], 10).run is None
    assert Rows.of([[], []], 10).run is None


def test_stretches_equal_brute_force() -> None:
    """Each used slot has its own query, and the queries stand where the stretches say."""
    draw = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(300):
        begin, first = (int(torch.randint(n, (), generator=draw)) for n in (8, 3))
        chosen = [
            [
                *range(first),
                *(p for p in range(first + begin, first + begin + 9) if torch.rand((), generator=draw) < 0.9),
            ]
            for _ in range(2)
        ]
        rows = Rows.of(chosen, 30)
        if rows.run is None:
            continue
        found += 1
        tokens = [*range(rows.run.first), *range(rows.run.begin, rows.run.end)]
        assert len(tokens) == rows.run.width and sum(map(len, chosen)) >= 0.75 * 2 * len(tokens)
        assert rows.run.exact == (chosen == [tokens, tokens])
        places = rows.run.places(rows.index_bk, rows.used_bk)
        for sample, (row, positions) in enumerate(zip(places.tolist(), chosen, strict=True)):
            assert [tokens[i] for i in row[: len(positions)]] == positions
            assert row[len(positions) :] == [len(tokens)] * (rows.shape[1] - len(positions))
            x = torch.randn(2, 1, rows.shape[1], 3, generator=draw)
            wide = spread(x, places, rows.run.width)[sample, 0]
            where = dict(zip(positions, x[sample, 0], strict=False))
            assert torch.equal(wide, torch.stack([where.get(token, torch.zeros(3)) for token in tokens]))
            back = collected(spread(x, places, rows.run.width), places)[sample, 0]
            assert torch.equal(back[: len(positions)], x[sample, 0, : len(positions)])
            assert not back[len(positions) :].any()
    assert found > 50 and run_of([[], [0, 1]]) is None


@pytest.mark.parametrize("sample", [[1] * 20 + [2] * 17, [0] * 3 + [1] * 34])
def test_packed_rows_and_padding_before_them_are_refused(sample: list[int]) -> None:
    rows = Rows.of([range(25, 36)], 37)
    (_, *selected), e = problem(rows, 2, torch.float32)
    segments = torch.tensor([sample], dtype=torch.int32)
    with pytest.raises(Unsupported, match="packed, or begin with padding"):
        run(selected, replace(e, segments_bs=segments, looks_at_bt=segments), rows, "sdpa")


def test_whether_rows_are_padded_is_read_once_a_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, segments = drawn(DRAWS["near"], (128, 127))
    e = replace(problem(rows, 2, torch.float32)[1], segments_bs=segments)
    read: list[Tensor] = []
    true = Tensor.__bool__
    monkeypatch.setattr(Tensor, "__bool__", lambda self: (read.append(self), true(self))[1])
    for _ in range(3):
        assert choice.no_run(torch.zeros(2, 2, rows.shape[1], 8), e, rows) is None
    assert len(read) == 1


def test_heads_that_share_keys_need_flash_attention_on_a_gpu() -> None:
    """Without it PyTorch forms all scores."""
    rows, _ = drawn(DRAWS["near"])
    for heads, dtype, runs in ((4, torch.bfloat16, True), (2, torch.float32, True), (4, torch.float32, False)):
        (_, q, *_), e = problem(rows, heads, dtype)
        with planning_for("cuda"):
            assert (choice.no_run(q, e, rows) is None) == runs


def test_ops_of_a_plan_keep_to_what_they_declare() -> None:
    """opcheck of schema and fake tensors; what they return is empty, so no two calls agree in values."""
    kinds = ("test_schema", "test_faketensor")
    q, do, k, v = (torch.randn(2, n, t, 8) for n, t in ((4, 5), (4, 5), (2, 12), (2, 12)))
    torch.library.opcheck(planned_attention, (q, k, v, 30), test_utils=kinds)
    lse = torch.randn(2, 4, 5)
    for slots in (5, 9, 12):
        torch.library.opcheck(planned_attention_backward, (do, q, k, v, do, lse, slots, 30), test_utils=kinds)


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("name", ["a tenth", "no first"])
def test_a_plan_forms_gradients_of_the_keys_that_are_read(name: str, context: bool) -> None:
    """dK and dV of keys up to the last row, of all where others train; by our kernels of selected ones."""
    rows, _ = drawn(DRAWS[name])
    (_, *selected), e = problem(rows, 4, torch.bfloat16)
    made: list[tuple[int, ...]] = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func._schema.name == "sparsetrain::planned_attention_backward":
                made.append(tuple(out[1].shape))
            return out

    for kernel, slots in (("sdpa", TOKENS - 1), ("triton", rows.shape[1])):
        with planning_for("cuda"), use_backend(kernel), Made():
            grads = run(selected, e, rows, "auto", context=context)
        assert made.pop()[2] == (TOKENS if context else slots)
        assert grads[2].shape == selected[1].shape
