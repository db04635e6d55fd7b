"""Selected rows of packed and padded samples by varlen attention: its metadata beside brute force, and the whole beside
plain PyTorch. The kernel is for a GPU; here a definition of it in plain PyTorch runs in its place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsetrain import TokenSelection
from sparsetrain.methods.token_selection.policies import Batch, draw
from sparsetrain.ops.selected_rows import KeyValues, Rows, choice, selected_attention, varlen
from tests.ops.test_selected_rows_backends import off, run
from tests.ops.test_selected_rows_runs import problem

DRAWS: dict[str, dict[str, Any]] = {
    "all targets": {"keep_ratio": 0.1, "pool": "targets", "keep_all_targets": True},
    "near": {"keep_ratio": 0.3, "pool": "targets", "keep_all_targets": True, "context": "near"},
    "no first": {"keep_ratio": 0.2, "pool": "targets", "always_keep": ()},
    "prefix": {"keep_ratio": 0.3, "policy": "prefix"},
}
FAILS = choice.varlen_fails.__wrapped__
PACKED = {
    "packed": [[40, 24, 36], [61, 39]],
    "packed, padding behind": [[40, 24, 20], [61, 39]],
    "padded": [[60], [100]],
}


def definition(
    q: Tensor, k: Tensor, v: Tensor, offsets_q: Tensor, offsets_k: Tensor, longest_q: int, longest_k: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn as it is documented, causal to the lower right."""
    assert offsets_q.dtype == offsets_k.dtype == torch.int32
    lengths_q, lengths_k = offsets_q.diff(), offsets_k.diff()
    assert longest_q == lengths_q.max() and longest_k == lengths_k.max() and lengths_k.min() > 0
    assert (offsets_q[0], offsets_q[-1], offsets_k[0], offsets_k[-1]) == (0, len(q), 0, len(k))
    assert window_size[1] == 0 and enable_gqa == (q.shape[1] != k.shape[1])
    rep, out = q.shape[1] // k.shape[1], []
    for n, (a, b), (c, d) in zip(
        lengths_q.tolist(), offsets_q.unfold(0, 2, 1).tolist(), offsets_k.unfold(0, 2, 1).tolist(), strict=True
    ):
        distance = torch.arange(d - c - n, d - c)[:, None] - torch.arange(d - c)
        seen = (distance >= 0) & ((distance <= window_size[0]) if window_size[0] >= 0 else torch.tensor(True))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d].repeat_interleave(rep, 1)) * scale
        p = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", p, v[c:d].repeat_interleave(rep, 1)))
    return torch.cat(out)


@pytest.fixture(autouse=True)
def defined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", definition)
    monkeypatch.setattr(choice, "no_flash", lambda *_: None)
    monkeypatch.setattr(choice, "varlen_fails", lambda *_: None)


def packed(lengths: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(segments, positions) int [b, 100]."""
    segments, positions = torch.zeros(2, len(lengths), 100, dtype=torch.int32).unbind(0)
    for row, found in enumerate(lengths):
        first = 0
        for i, n in enumerate(found):
            segments[row, first : first + n] = i + 1
            positions[row, first : first + n] = torch.arange(n)
            first += n
    return segments, positions


def drawn(chosen: dict[str, Any], lengths: list[list[int]]) -> tuple[Rows, Tensor]:
    """The last quarter of every document are targets."""
    segments, positions = packed(lengths)
    ids = torch.randint(1000, segments.shape, generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    for row, found in enumerate(lengths):
        for i, n in enumerate(found):
            at = (segments[row] == i + 1) & (positions[row] >= n - n // 4)
            labels[row, at] = ids[row, at]
    given = {"input_ids": ids, "labels": labels, "attention_mask": (segments > 0).long(), "position_ids": positions}
    return draw(TokenSelection(**chosen), Batch.of(given, causal=True), step=0), segments


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("rows", PACKED)
@pytest.mark.parametrize("name", DRAWS)
def test_varlen_attention_of_drawn_rows(name: str, rows: str, heads: int, window: int | None) -> None:
    """Output and every gradient, with and without gradient to every key, beside the tiles in fp64."""
    chosen, segments = drawn(DRAWS[name], PACKED[rows])
    (_, *selected), e = problem(chosen, heads, torch.float64)
    e = replace(e, segments_bs=segments, looks_at_bt=segments, window=window)
    for context in (False, True):
        found, expected = (run(selected, e, chosen, name, context=context) for name in ("varlen", "torch"))
        assert off(found, expected) < 1e-12


def test_offsets_equal_brute_force() -> None:
    """What each query of the calls sees is what its row sees, and each row is one query."""
    found = 0
    for seed in range(60):
        draw = torch.Generator().manual_seed(seed)
        segments, _ = packed(PACKED["packed, padding behind"])
        keep = torch.rand(segments.shape, generator=draw) < 0.95
        begins = torch.randint(100, (2, 5), generator=draw)
        near = torch.stack([((torch.arange(100) - b[:, None]) % 100 < 9).any(0) for b in begins])
        rows = Rows.of([(near[i] & keep[i] & (segments[i] > 0)).nonzero().flatten() for i in range(2)], 100)
        documents = varlen.documents_of(KeyValues(*torch.zeros(2, 2, 1, 100, 4), True, 1.0, segments), rows)
        if documents is None:
            continue
        found += 1
        sees: list[tuple[int, int]] = []  # of every query, the keys from .. to its own, in one line
        for call in documents.calls:
            q, k = call.offsets_q.tolist(), call.offsets_k.tolist()
            for a, b, c, d in zip(q, q[1:], k, k[1:], strict=False):
                sees += [(c, d - (b - a) + i) for i in range(b - a)]
        places = documents.places_n.view(rows.shape).tolist()
        for sample, positions in enumerate(rows.positions):
            for p, place in zip(positions, places[sample], strict=False):
                start = int((segments[sample] == segments[sample, p]).nonzero()[0])
                assert sees[place] == (sample * 100 + start, sample * 100 + p)
            assert places[sample][len(positions) :] == [len(sees)] * (rows.shape[1] - len(positions))
    assert found > 10


def test_rows_that_do_not_stand_together_are_left_to_others() -> None:
    segments, _ = packed(PACKED["packed"])
    e = KeyValues(*torch.zeros(2, 2, 1, 100, 4), True, 1.0, segments)
    for positions in ([range(0, 100, 3)] * 2, [[], []]):
        assert varlen.documents_of(e, Rows.of(positions, 100)) is None
    for row in ([1] * 40 + [0] * 5 + [1] * 55, [2] * 50 + [1] * 50):  # a document in two pieces, or out of order
        parted = replace(e, segments_bs=torch.tensor([row, row], dtype=torch.int32))
        assert varlen.documents_of(parted, Rows.of([range(60, 99)] * 2, 100)) is None
    padding = replace(e, segments_bs=packed(PACKED["padded"])[0])
    assert varlen.documents_of(padding, Rows.of([range(50, 61), range(50, 61)], 100)) is None


def test_documents_are_read_once_a_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, segments = drawn(DRAWS["near"], PACKED["packed"])
    e = KeyValues(*torch.zeros(2, 2, 1, 100, 4), True, 1.0, segments)
    first = varlen.documents_of(e, rows)
    monkeypatch.setattr(varlen, "starts", None)
    assert varlen.documents_of(e, rows) is first is not None


def test_why_varlen_attention_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    rows, segments = drawn(DRAWS["near"], PACKED["packed"])
    (_, q, *_), e = problem(rows, 2, torch.float32)
    e = replace(e, segments_bs=segments, looks_at_bt=segments)
    assert choice.no_documents(q, e, rows) == "flash attention is for a GPU"
    monkeypatch.setattr(choice, "no_flash", lambda *_: None)
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, scale: query)
    assert choice.no_documents(q, e, rows) == "this PyTorch's varlen attention does not know enable_gqa, window_size"
    monkeypatch.setattr(varlen, "varlen_attn", None)
    assert choice.no_documents(q, e, rows) == "this PyTorch has no varlen attention"


def test_varlen_attention_that_fails_or_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for window in (False, True):
        form = (torch.device("cpu"), torch.float32, 16, window, True)
        assert FAILS(*form) is None
    monkeypatch.setattr(varlen, "varlen_attn", lambda q, k, v, *a, **kw: 1.1 * definition(q, k, v, *a, **kw))
    assert "off by" in str(FAILS(*form))
    monkeypatch.setattr(varlen, "varlen_attn", lambda *_, **__: 1 / 0)
    assert "ZeroDivisionError" in str(FAILS(*form))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_varlen_attention_on_a_gpu(
    dtype: torch.dtype, head_dim: int, window: bool, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    if reason := varlen.no_varlen():
        pytest.skip(reason)
    device = torch.device("cuda", torch.cuda.current_device())
    assert choice.varlen_fails(device, dtype, head_dim, window, grouped) is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sdpa", "flex"])
@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("heads", [2, 4])
def test_libraries_on_a_gpu(name: str, context: bool, heads: int) -> None:
    """Forward and every gradient beside plain PyTorch in fp64; rows with holes, of samples that end apart."""
    rows = Rows.of([[0, *range(300, 499)], [0, *range(310, 400), *range(402, 495)]], 512)
    if name == "flex":
        rows = Rows.of([range(0, 512, 3), range(1, 512, 5)], 512)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 512, 64, generator=draw).bfloat16() for n in (heads, 2, 2))
    used = torch.ones(rows.shape) if rows.used_bk is None else rows.used_bk
    weight = torch.randn(2, heads, rows.shape[1], 64, generator=draw) * used[:, None, :, None]

    def gradients(backend: str, device: str, dtype: torch.dtype) -> list[Tensor]:
        here = rows.to(torch.device(device))
        given = [rows.gather(x.transpose(1, 2)).transpose(1, 2).to(device, dtype).requires_grad_() for x in (q, k, v)]
        more = [x.to(device, dtype).requires_grad_() for x in (k, v)] if context else []
        e = KeyValues(k.to(device, dtype), v.to(device, dtype), True, 0.125)
        out = selected_attention(*given, e, here, context=tuple(more) or None, backend=backend)  # type: ignore[arg-type]
        kept = out.detach().cpu() * used[:, None, :, None]
        return [kept, *(x.cpu() for x in torch.autograd.grad(out, [*given, *more], weight.to(device, dtype)))]

    found, expected = gradients(name, "cuda", torch.bfloat16), gradients("torch", "cpu", torch.float64)
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= 2e-2 * b.norm()
