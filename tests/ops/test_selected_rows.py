"""Functions on selected rows against the detach definition: fp64, odd sizes, ragged counts, packing, windows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.ops.linear_parts import LinearParts
from sparsetrain.ops.selected_rows import (
    KeyValues,
    Rows,
    adapted_linear,
    adapted_product,
    attention_of_all,
    attention_of_queries,
    keep,
    queries,
    replace_rows,
    selected_attention,
    selected_attention_reference,
    selected_dropout,
    selected_linear,
    take_rows,
    tiles,
)
from sparsetrain.ops.selected_rows.cases import TINY, TOLERANCE, Case
from sparsetrain.ops.selected_rows.received import received_mass


def rows_of(counts: tuple[int, ...], tokens: int, seed: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    return Rows.of([torch.randperm(tokens, generator=generator)[:n] for n in counts], tokens)


def used(x: Tensor, rows: Rows) -> Tensor:
    """[b, k, ...] -> [all used slots, ...]."""
    return torch.cat([row[:n] for row, n in zip(x, rows.counts, strict=True)])


@pytest.mark.parametrize("counts", [(5, 5), (7, 2), (0, 3), (11, 11), (1, 1)])
def test_rows_know_what_is_selected(counts: tuple[int, ...]) -> None:
    rows = rows_of(counts, 11)
    assert rows.selected_bt.sum(1).tolist() == list(counts)
    assert rows.everything == (counts == (11, 11))
    x = torch.randn(2, 11, 3)
    assert torch.equal(used(rows.gather(x), rows), x[rows.selected_bt])
    assert torch.equal(rows.gather(x.flatten(0, 1)), rows.gather(x).flatten(0, 1))
    assert torch.equal(rows.gather(x[:1]), rows.gather(x[:1].expand(2, -1, -1)))


@pytest.mark.parametrize("positions", [[3, 3], [-1, 2], [0, 11]])
def test_impossible_positions_are_refused(positions: list[int]) -> None:
    with pytest.raises(ValueError, match="distinct and lie in"):
        Rows.of([positions], 11)


@pytest.mark.parametrize("counts", [(5, 5), (7, 2), (0, 3)])
def test_taking_and_replacing_cut_the_gradient_of_other_rows(counts: tuple[int, ...]) -> None:
    rows = rows_of(counts, 11)
    x = torch.randn(2, 11, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 11, 3, dtype=torch.float64)
    y = replace_rows(x.detach() * 2, take_rows(x, rows) * 2, rows)
    assert torch.equal(y, x.detach() * 2)
    (y * weight).sum().backward()
    expected = torch.where(rows.selected_bt[:, :, None], 2 * weight, 0)
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_takes_known_values_and_has_the_dense_gradient(transposed: bool, bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    w = torch.randn((7, 3) if transposed else (3, 7), dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, dtype=torch.float64, requires_grad=True) if bias else None

    def run(*tensors: Tensor) -> Tensor:
        with torch.no_grad():
            known = F.linear(x, w.t() if transposed else w, b)
        return selected_linear(*tensors, known=known, transposed=transposed)

    inputs = [z for z in (x, w, b) if z is not None]
    dense = F.linear(x, w.t() if transposed else w, b)
    assert torch.equal(run(*inputs), dense)
    weight = torch.randn_like(dense)
    expected = torch.autograd.grad((dense * weight).sum(), inputs)
    for found, grad in zip(torch.autograd.grad((run(*inputs) * weight).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(found, grad, rtol=1e-12, atol=1e-12)


def test_linear_with_a_frozen_weight_saves_no_input() -> None:
    x, w = torch.randn(4, 7, requires_grad=True), torch.randn(3, 7)
    known = F.linear(x, w).detach()
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        selected_linear(x, w, known=known)
    assert saved == [(3, 7)]


def test_dropout_uses_the_mask_that_was_drawn() -> None:
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    out, mask = torch.native_dropout(x.detach(), 0.4, True)
    y = selected_dropout(x, mask, 1 / 0.6, known=out)
    assert torch.equal(y, out)
    y.sum().backward()
    torch.testing.assert_close(x.grad, mask.double() / 0.6)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("context", [False, True], ids=["", "context"])
def test_attention_equals_the_detach_definition(
    case: Case, known: bool, context: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsetrain.ops.selected_rows.tiles.TILE_ROWS", 6 * case.heads // case.kv_heads)
    b, t, d = 2, case.tokens, case.head_dim
    segments = case.segment_ids()
    rows = rows_of(case.counts, t)
    if segments is not None and (segments == 0).any():  # padding is never selected
        index = [row[:n] for row, n in zip(rows.index_bk, case.counts)]
        rows = Rows.of([row[segments[i, row] > 0] for i, row in enumerate(index)], t)
    torch.manual_seed(1)
    shapes = ((b, case.heads, t, d), (b, case.kv_heads, t, d), (b, case.kv_heads, t, d))
    q, k, v = (torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes)
    weight = torch.randn(b, t, case.heads, d, dtype=torch.float64)
    cut = [keep(x.transpose(1, 2), rows.selected_bt).transpose(1, 2) for x in (q, k, v)]
    dense = selected_attention_reference(
        *((cut[0], k, v) if context else cut),
        torch.ones_like(rows.selected_bt) if context else rows.selected_bt,
        scale=0.4, segments_bt=segments, causal=case.causal, window=case.window,
    ).transpose(1, 2)  # fmt: skip
    expected = torch.autograd.grad((dense * weight)[rows.selected_bt].sum(), (q, k, v))
    everything = KeyValues(k.detach(), v.detach(), case.causal, 0.4, segments, case.window)
    q_s, k_s, v_s = (take_rows(x.transpose(1, 2), rows).transpose(1, 2) for x in (q, k, v))
    values = rows.gather(dense.detach()).transpose(1, 2) if known else None
    more = (k, v) if context else None
    out = selected_attention(q_s, k_s, v_s, everything, rows, known=values, context=more).transpose(1, 2)
    near = TOLERANCE[torch.float64]
    torch.testing.assert_close(used(out, rows), dense[rows.selected_bt].detach(), rtol=near, atol=near)
    found = torch.autograd.grad((used(out, rows) * weight[rows.selected_bt]).sum(), (q, k, v))
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=near, atol=near)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_received_mass_is_the_sum_of_the_selected_queries_probabilities(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsetrain.ops.selected_rows.tiles.TILE_ROWS", 6 * case.heads // case.kv_heads)
    b, t, d = 2, case.tokens, case.head_dim
    rows, segments = rows_of(case.counts, t), case.segment_ids()
    torch.manual_seed(1)
    q, k = (torch.randn(b, n, t, d, dtype=torch.float64) for n in (case.heads, case.kv_heads))
    everything = KeyValues(k, k, case.causal, 0.4, segments, case.window)
    found = received_mass(rows.gather(q.transpose(1, 2)).transpose(1, 2), everything, rows)
    # the attention of one-hot values is the map itself
    one_hot = torch.eye(t, dtype=torch.float64).expand(b, case.kv_heads, t, t)
    maps = selected_attention_reference(
        q, k, one_hot, rows.selected_bt, scale=0.4, segments_bt=segments, causal=case.causal, window=case.window
    )
    expected = (maps * rows.selected_bt[:, None, :, None]).sum((1, 2))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("case", [case for case in TINY if case.counts == (13, 13)], ids=lambda case: case.name)
def test_attention_of_all_rows_in_bf16_is_as_near_as_eager(
    case: Case, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As near to fp64 as the attention that transformers calls eager, whose scores are bf16 too."""
    monkeypatch.setattr("sparsetrain.ops.selected_rows.all_rows._units", lambda: (True, amx))
    t, d, segments = case.tokens, case.head_dim, case.segment_ids()
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, n, t, d, dtype=torch.bfloat16) for n in (case.heads, case.kv_heads, case.kv_heads))
    found = attention_of_all(q, KeyValues(k, v, case.causal, 0.4, segments, case.window))
    assert (found is None) == (amx and segments is None and case.window is None)  # PyTorch's own needs no mask
    if found is None:
        return
    form = {"causal": case.causal, "scale": 0.4, "window": case.window, "segments_bt": segments}
    everywhere = torch.ones(2, t, dtype=torch.bool)
    exact = selected_attention_reference(q.double(), k.double(), v.double(), everywhere, **form)
    k, v = (x.repeat_interleave(case.heads // case.kv_heads, 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) * 0.4).masked_fill(~_visible(case), float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).nan_to_num()  # of a row that sees nothing
    eager = weights.bfloat16() @ v
    sees = _visible(case).any(-1).expand(-1, case.heads, -1)
    assert (found.double() - exact)[sees].norm() <= 1.3 * (eager.double() - exact)[sees].norm()
    assert not found[~sees].any()


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", [(0, 9), (9, 0), (4, 5)])
def test_padding_looks_at_the_sequence_beside_it(
    padding: tuple[int, int], causal: bool, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in transformers, whose mask has columns alone; what sees nothing is 0."""
    monkeypatch.setattr("sparsetrain.ops.selected_rows.all_rows._units", lambda: (True, amx))
    torch.manual_seed(4)
    q, k, v = (torch.randn(2, n, 33, 8, dtype=torch.bfloat16) for n in (4, 2, 2))
    segments = torch.ones(2, 33, dtype=torch.int32)
    segments[1, : padding[0]] = 0
    segments[1, 33 - padding[1] :] = 0
    found = attention_of_all(q, KeyValues(k, v, causal, 0.4, segments, None, torch.ones_like(segments)))
    mask = (segments > 0)[:, None, None].expand(-1, 1, 33, -1)
    mask = mask.tril() if causal else mask
    expected = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), mask, scale=0.4, enable_gqa=True)
    assert found is not None
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)


def _visible(case: Case) -> Tensor:
    """bool [2, 1, t, t]: which keys each query sees."""
    distance = torch.arange(case.tokens)[:, None] - torch.arange(case.tokens)[None]
    seen = (distance >= 0) if case.causal else torch.ones_like(distance, dtype=torch.bool)
    if case.window is not None:
        seen = seen & (distance.abs() < case.window)
    segments = case.segment_ids()
    if segments is None:
        return seen.expand(2, 1, -1, -1)
    return (seen & (segments[:, :, None] == segments[:, None]) & (segments > 0)[:, None])[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_attention_of_all_rows_is_pytorchs_elsewhere(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsetrain.ops.selected_rows.all_rows._units", lambda: (True, False))
    q = torch.randn(1, 2, 5, 4, dtype=dtype)
    assert attention_of_all(q, KeyValues(q, q, True, 0.5)) is None


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_with_lora_as_one_node_equals_its_parts(known: bool, bias: bool) -> None:
    torch.manual_seed(4)
    draw = {"dtype": torch.float64}
    x, a, b = (torch.randn(shape, **draw).requires_grad_() for shape in ((2, 3, 5), (2, 5), (7, 2)))
    parts = LinearParts(torch.randn(7, 5, **draw), torch.randn(7, **draw) if bias else None, (a, b))
    y = F.linear(x, parts.weight, parts.bias) + F.linear(F.linear(x, a), b)
    out = adapted_linear(x, parts, known=y.detach() if known else None)
    torch.testing.assert_close(out, y, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(y)
    expected, found = (torch.autograd.grad((each * weight).sum(), (x, a, b)) for each in (y, out))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, a, b: adapted_linear(x, replace(parts, lora=(a, b))), (x, a, b))


def test_a_product_with_lora_in_bf16_keeps_the_models_dtype() -> None:
    """Beside fp32 factors: as near to fp64 as PEFT's arithmetic, which rounds the same sum once less."""
    torch.manual_seed(5)
    x, weight = torch.randn(1, 9, 64).bfloat16(), torch.randn(32, 64).bfloat16()
    a, b = torch.randn(4, 64), torch.randn(32, 4)
    out = adapted_product(x, LinearParts(weight, None, (a, b)))
    exact = x.double() @ weight.double().t() + x.double() @ a.double().t() @ b.double().t()
    pefts = (F.linear(x, weight) + F.linear(F.linear(x.float(), a), b)).bfloat16()
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).norm() <= 3 * (pefts.double() - exact).norm()


def test_attention_in_the_tiles_of_a_gpu_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of((150, 40), 200)
    torch.manual_seed(2)
    keys, values = torch.randn(2, 2, 2, 200, 3, dtype=torch.float64)
    q, k, v = (torch.randn(2, n, 150, 3, dtype=torch.float64).requires_grad_() for n in (4, 2, 2))

    def run() -> list[Tensor]:
        out = selected_attention(q, k, v, KeyValues(keys, values, True, 0.5), rows)
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    small = run()
    monkeypatch.setattr(tiles, "tuned_for", lambda _x: "cuda")
    large = run()
    for a, b in zip(small, large, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_attention_passes_gradcheck() -> None:
    rows = rows_of((4, 4), 7)
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 2, 7, 3, dtype=torch.float64)
    index = rows.index_bk[:, None, :, None].expand(-1, 2, -1, 3)

    def run(q: Tensor, k_s: Tensor, v_s: Tensor) -> Tensor:
        # the selected keys stand among all keys, as they do in a model
        k, v = keys.scatter(2, index, k_s.detach()), values.scatter(2, index, v_s.detach())
        return selected_attention(q, k_s, v_s, KeyValues(k, v, True, 0.5), rows)

    inputs = (torch.randn(2, 4, 4, 3, dtype=torch.float64), keys.gather(2, index), values.gather(2, index))
    assert torch.autograd.gradcheck(run, tuple(x.requires_grad_() for x in inputs))


def test_attention_reads_no_memory_that_it_did_not_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.empty_like", lambda x, **_: torch.full(x.shape, float("nan"), dtype=x.dtype))
    rows = rows_of((5, 0), 9)
    q, k, v = (torch.randn(2, 2, 5, 4, requires_grad=True) for _ in range(3))
    everything = KeyValues(torch.randn(2, 2, 9, 4), torch.randn(2, 2, 9, 4), True, 0.5)
    out = selected_attention(q, k, v, everything, rows)
    out.sum().backward()
    assert all(x.isfinite().all() for x in (out, q.grad, k.grad, v.grad))
    assert not q.grad[1].any() and not k.grad[1].any()


def test_a_single_token_at_the_start_attends_to_itself() -> None:
    rows = Rows.of([[0]], 9)
    k, v = torch.randn(2, 1, 2, 9, 4, dtype=torch.float64)
    q = torch.randn(1, 2, 1, 4, dtype=torch.float64, requires_grad=True)
    v_s = v[:, :, :1].clone().requires_grad_()
    out = selected_attention(q, k[:, :, :1], v_s, KeyValues(k, v, True, 0.5), rows)
    assert torch.equal(out, v[:, :, :1])
    out.sum().backward()
    assert torch.equal(v_s.grad, torch.ones_like(v_s)) and not q.grad.any()


@pytest.mark.parametrize("causal", [True, False])
def test_padding_that_is_selected_sees_the_sequence_beside_it(causal: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 9, 8, generator=draw, dtype=torch.float64).requires_grad_() for h in (4, 2, 2))
    segments = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0], [0] * 9])  # the second row sees nothing at all
    looks_at = torch.ones_like(segments)
    rows = Rows.of([[0, 1, 3, 5, 7], [0, 2, 4, 6, 8]], 9)
    form = {"causal": causal, "scale": 0.3, "window": None}
    expected = selected_attention_reference(
        q, k, v, rows.selected_bt, segments_bt=segments, looks_at_bt=looks_at, **form
    )
    expected = rows.gather(expected.transpose(1, 2)).transpose(1, 2)
    chosen = [rows.gather(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v)]
    everything = KeyValues(k.detach(), v.detach(), causal, 0.3, segments, None, looks_at)
    found = selected_attention(*chosen, everything, rows)
    torch.testing.assert_close(found, expected)
    assert (found[1] == 0).all()
    grad = torch.randn(found.shape, generator=draw, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(found, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 4), (False, 4)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk", [3, 512])
def test_attention_of_queries_equals_rows_of_the_dense_one(
    causal: bool, window: int | None, packed: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, and gradients to every key; a cache's keys before the queries; a sample without queries."""
    monkeypatch.setattr(queries, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(3)
    b, h, g, t, s, d = 3, 4, 2, 11, 13 if not packed else 11, 5
    q, k, v = (
        torch.randn(b, heads, n, d, dtype=torch.float64, generator=generator, requires_grad=True)
        for heads, n in ((h, t), (g, s), (g, s))
    )
    selected = torch.rand(b, t, generator=generator) > 0.5
    selected[1] = False
    segments = torch.tensor([[1] * 4 + [2] * 5 + [0] * 2, [1] * 11, [0] * 3 + [1] * 8]) if packed else None
    e = KeyValues(k, v, causal, 0.3, segments, window)
    found = attention_of_queries(q, e, selected)
    distance = torch.arange(s - t, s)[:, None] - torch.arange(s)[None]
    seen = (distance >= 0 if causal else distance == distance) & ((distance.abs() < window) if window else True)
    seen = seen[None].expand(b, -1, -1)
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None]) & (segments[:, None] > 0)
    scores = (q @ k.repeat_interleave(2, 1).mT) * 0.3
    p = scores.masked_fill(~seen[:, None], -1e30).softmax(-1).masked_fill(~seen[:, None], 0)
    expected = (p @ v.repeat_interleave(2, 1)).transpose(1, 2)[selected]
    torch.testing.assert_close(found, expected)
    weight = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
    ):
        torch.testing.assert_close(one, other)


def test_attention_of_no_queries() -> None:
    q, k = torch.randn(2, 4, 5, 3, requires_grad=True), torch.randn(2, 2, 5, 3)
    found = attention_of_queries(q, KeyValues(k, k, True, 1.0), torch.zeros(2, 5, dtype=torch.bool))
    assert found.shape == (0, 4, 3)
