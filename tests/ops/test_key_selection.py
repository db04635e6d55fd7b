"""Kept keys against a scalar loop of the rule, kept blocks against brute force, and what a model relies on."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import sparsetrain.ops.key_selection.keys as key_tiles
import sparsetrain.ops.key_selection.probes as probe_tiles
from sparsetrain.core.errors import Unsupported
from sparsetrain.ops.key_selection import Visibility, select_blocks, select_keys
from sparsetrain.ops.key_selection.cases import TINY, Case
from sparsetrain.ops.product_quantization import encode

B, H, G, T, D = (getattr(TINY[0], size) for size in ("batch", "heads", "kv_heads", "tokens", "head_dim"))


@pytest.fixture(autouse=True)
def many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_tiles, "TILE_ELEMENTS", 300)
    monkeypatch.setattr(probe_tiles, "TILE_ELEMENTS", 300)


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return TINY[0].tensors(seed)


def segments() -> torch.Tensor:
    return TINY[0].segments()


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
@pytest.mark.parametrize("score", ["match_count", "table", "attention"])
def test_exact_selection_equals_the_rule(case: Case, score: str) -> None:
    q, k, codebook = case.tensors()
    visibility = case.visibility()
    limit = torch.full((B, T), 8)
    limit[1] = 5
    options = {"score": score, "local_tokens": 3}
    found = select_keys(q, k, codebook, limit, visibility, **options)
    expected = select_keys(q, k, codebook, limit, visibility, **options, backend="reference")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
@pytest.mark.parametrize("local", [0, 3, 16])
def test_bucket4_equals_the_rule(case: Case, local: int) -> None:
    q, k, codebook = case.tensors()
    visibility = case.visibility()
    limit = torch.full((B, T), 8)
    options = {"score": "match_count", "selection": "bucket4", "local_tokens": local, "keep_first": local == 3}
    found = select_keys(q, k, codebook, limit, visibility, **options)
    expected = select_keys(q, k, codebook, limit, visibility, **options, backend="reference")
    assert torch.equal(found, expected)


def test_equal_codes_keep_the_newest_keys() -> None:
    q, k = torch.ones(1, 1, 20, 32), torch.ones(1, 1, 20, 32)
    codebook = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    limit = torch.full((1, 20), 5)
    keys = select_keys(q, k, codebook, limit, Visibility(True), score="match_count", local_tokens=0, keep_first=False)
    assert keys[0, 0, 19].tolist() == [15, 16, 17, 18, 19]
    assert keys[0, 0, 1].tolist() == [0, 1, -1, -1, -1]


def test_a_query_agrees_fully_with_an_equal_key() -> None:
    q, _, codebook = data()
    assert torch.equal(encode(q, codebook), encode(q.clone(), codebook))


def test_decoding_sees_what_the_whole_sequence_sees() -> None:
    q, k, codebook = data()
    limit = torch.full((B, T), 6)
    whole = select_keys(q, k, codebook, limit, Visibility(True))
    last = select_keys(q[:, :, -1:], k, codebook, limit[:, -1:], Visibility(True))
    assert torch.equal(last[:, :, 0], whole[:, :, -1])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("score", ["table", "match_count", "attention", "mean"])
def test_blocks_are_visible_unique_and_hold_the_forced_ones(causal: bool, score: str) -> None:
    q, k, codebook = data()
    slots = torch.full((B, 8), 5)
    lists = select_blocks(
        q, k, codebook, slots, Visibility(causal), block_q=4, block_k=4, scale=0.2, score=score, local_tokens=4
    )
    assert lists.shape == (B, G, 8, 5)
    for row in lists.flatten(0, 1):
        for i, blocks in enumerate(row.tolist()):
            kept = [x for x in blocks if x >= 0]
            assert len(set(kept)) == len(kept)
            assert len(kept) == (min(5, i + 1) if causal else 5)
            assert {0, i, max(0, i - 1)} <= set(kept)
            assert all(x <= i for x in kept) or not causal


def test_the_choice_of_a_block_reads_nothing_later_than_its_first_query() -> None:
    q, k, codebook = data()
    slots = torch.full((B, 8), 4)
    options = {"block_q": 4, "block_k": 4, "scale": 0.2, "local_tokens": 0}
    before = select_blocks(q, k, codebook, slots, Visibility(True), **options)
    q[:, :, 17:], k[:, :, 16:] = (x[:, :, n:] for x, n in zip(data(seed=1), (17, 16)))
    after = select_blocks(q, k, codebook, slots, Visibility(True), **options)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert not torch.equal(before[:, :, 5:], after[:, :, 5:])


def test_the_block_that_holds_the_attention_is_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(1, 4, 8, 8, generator=generator)
    quiet, loud = codebook[0, :, 0].flatten() * 0.01, codebook[0, :, 3].flatten()
    k = quiet.repeat(1, 1, 64, 1)
    k[:, :, 20:24] = loud
    q = loud.repeat(1, 2, 64, 1)
    lists = select_blocks(
        q, k, codebook, torch.full((1, 16), 4), Visibility(True), block_q=4, block_k=4, scale=1.0, local_tokens=0
    )
    assert all(5 in blocks for blocks in lists[0, 0, 6:].tolist())


def test_segments_do_not_see_each_other() -> None:
    q, k, codebook = data()
    ids = torch.tensor([[1] * 12 + [2] * 17, [1] * 16 + [0] * 13])
    lists = select_blocks(
        q, k, codebook, torch.full((B, 8), 6), Visibility(True, ids), block_q=4, block_k=4, scale=0.2, local_tokens=4
    )
    assert (lists[0, :, 3:] >= 3).logical_or(lists[0, :, 3:] == -1).all()
    assert all(3 in blocks for blocks in lists[0, 0, 3:].tolist())
    assert (lists[1, :, 4:] == -1).all()


@pytest.mark.parametrize("causal", [True, False])
def test_equal_products_are_broken_by_nearness_then_by_place(causal: bool) -> None:
    q, k, codebook = data()
    # one-hot codes as vectors: their product is the number of equal codes, so most scores tie
    q_hot, k_hot = (F.one_hot(encode(x, codebook).long(), 6).flatten(-2).double() for x in (q, k))
    limit, options = torch.full((B, T), 7), {"local_tokens": 2, "keep_first": False}
    counts = select_keys(q, k, codebook, limit, Visibility(causal), score="match_count", distance="l1", **options)
    assert torch.equal(select_keys(q_hot, k_hot, None, limit, Visibility(causal), score="attention", **options), counts)


@pytest.mark.parametrize("score", ["match_count", "table", "attention"])
def test_no_later_token_reaches_the_keys_of_an_earlier_query(score: str) -> None:
    q, k, codebook = data()
    limit = torch.full((B, T), 6)
    before = select_keys(q, k, codebook, limit, Visibility(True), score=score, local_tokens=2)
    for place in range(1, T, 5):
        other_q, other_k = q.clone(), k.clone()
        other_q[:, :, place:], other_k[:, :, place:] = torch.nan, torch.nan
        after = select_keys(other_q, other_k, codebook, limit, Visibility(True), score=score, local_tokens=2)
        assert torch.equal(before[:, :, :place], after[:, :, :place])


@pytest.mark.parametrize("selection", ["exact", "bucket4"])
def test_padding_and_packing_change_no_key(selection: str) -> None:
    q, k, codebook = data()
    limit, options = torch.full((B, T), 8), {"score": "match_count", "selection": selection, "local_tokens": 3}
    ids = torch.tensor([[0] * 4 + [5] * 12 + [2] * 13]).expand(B, -1)
    packed = select_keys(q, k, codebook, limit, Visibility(True, ids), **options)
    for start, stop in ((4, 16), (16, 29)):
        here = slice(start, stop)
        alone = select_keys(q[:, :, here], k[:, :, here], codebook, limit[:, here], Visibility(True), **options)
        assert torch.equal(packed[:, :, here], torch.where(alone < 0, -1, alone + start))
    assert (packed[:, :, :4] == -1).all()


@pytest.mark.parametrize("limit", [1, 29, 100])
def test_extreme_budgets(limit: int) -> None:
    q, k, codebook = data()
    for score in ("match_count", "attention"):
        keys = select_keys(
            q, k, codebook, torch.full((B, T), limit), Visibility(True), score=score, local_tokens=1, keep_first=False
        )
        assert keys.shape[-1] == min(limit, T) and torch.equal(
            (keys >= 0).sum(-1)[0, 0], (torch.arange(T) + 1).clamp(max=limit)
        )
        assert (keys == torch.arange(T)[:, None]).any(-1).all()


def test_strides_and_half_precision_change_nothing() -> None:
    q, k, _ = data()
    q, k = (x.bfloat16().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    limit, slots = torch.full((B, T), 6), torch.full((B, 8), 5)
    shape = {"block_q": 4, "block_k": 4, "scale": 0.2, "score": "attention"}
    for x, y in (
        (q, k),
        (q.float().contiguous(), k.float().contiguous()),
    ):
        keys = select_keys(x, y, None, limit, Visibility(True), score="attention")
        blocks = select_blocks(x, y, None, slots, Visibility(True), **shape)
        if x is q:
            expected = keys, blocks
        assert torch.equal(keys, expected[0]) and torch.equal(blocks, expected[1])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_attention_blocks_follow_the_softmax_of_the_probes(causal: bool, packed: bool) -> None:
    q, k, _ = (x.double() for x in data())
    ids = torch.tensor([[1] * 12 + [2] * 17, [1] * 16 + [0] * 13]) if packed else torch.ones(B, T, dtype=torch.int64)
    visibility = Visibility(causal, ids if packed else None)
    options = {"block_q": 4, "block_k": 4, "scale": 0.3, "local_tokens": 4, "score": "attention", "num_probes": 2}
    found = select_blocks(q, k, None, torch.full((B, 8), 5), visibility, **options)
    place = torch.arange(T)
    seen = (ids[:, :, None] == ids[:, None]) & (ids > 0)[:, None] & ((place[:, None] >= place) | (not causal))
    logits = (q @ k.repeat_interleave(H // G, 1).mT) * 0.3
    weights = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0)
    mass = F.pad(weights.view(B, G, H // G, T, T).sum(2), (0, 3)).unflatten(-1, (8, 4)).sum(-1)  # [b, g, t, n]
    for b, g, i in torch.cartesian_prod(torch.arange(B), torch.arange(G), torch.arange(8)).tolist():
        probes = [4 * i, 4 * i - 4] if causal else [min(T - 1, 4 * i + 1), min(T - 1, 4 * i + 3)]
        probes = [p for p in probes if p >= 0 and ids[b, p] == ids[b, 4 * i] and ids[b, p] > 0]
        total = mass[b, g, probes].sum(0)
        kept = [n for n in found[b, g, i].tolist() if n >= 0]
        visible = [n for n in range(8) if seen[b, 4 * i : 4 * i + 4, 4 * n : 4 * n + 4].any()]
        local = [n for n in visible if i - 1 <= n <= (i if causal else i + 1)]
        first = [min(visible)] if visible else []
        rest = sorted(set(visible) - {*local, *first}, key=lambda n: -float(total[n]))
        assert set(kept) == set(local + first) | set(rest[: 5 - len({*local, *first})])


@pytest.mark.parametrize("score", ["table", "match_count", "attention", "mean"])
def test_no_later_token_reaches_the_list_of_an_earlier_block(score: str) -> None:
    q, k, codebook = data()
    slots, options = torch.full((B, 8), 4), {"block_q": 4, "block_k": 4, "scale": 0.2, "score": score}
    before = select_blocks(q, k, codebook, slots, Visibility(True), local_tokens=0, **options)
    for place in range(1, T, 3):
        other_q, other_k = q.clone(), k.clone()
        other_q[:, :, place:], other_k[:, :, place:] = torch.nan, torch.nan
        after = select_blocks(other_q, other_k, codebook, slots, Visibility(True), local_tokens=0, **options)
        unchanged = -(-place // 4)  # the block of `place` itself may read its own first query
        assert torch.equal(before[:, :, :unchanged], after[:, :, :unchanged])


@pytest.mark.parametrize("score", ["table", "match_count", "attention", "mean"])
def test_aligned_packing_changes_no_block(score: str) -> None:
    q, k, codebook = data()
    ids = torch.tensor([[7] * 8 + [3] * 21]).expand(B, -1)
    options = {"block_q": 4, "block_k": 4, "scale": 0.2, "score": score, "local_tokens": 4}
    packed = select_blocks(q, k, codebook, torch.full((B, 8), 4), Visibility(True, ids), **options)
    for start, stop in ((0, 8), (8, 29)):
        here, rows = slice(start, stop), slice(start // 4, -(-stop // 4))
        slots = torch.full((B, rows.stop - rows.start), 4)
        alone = select_blocks(q[:, :, here], k[:, :, here], codebook, slots, Visibility(True), **options)
        moved = torch.where(alone < 0, -1, alone + start // 4)
        assert torch.equal(packed[:, :, rows][..., : moved.shape[-1]], moved)
        assert (packed[:, :, rows][..., moved.shape[-1] :] == -1).all()


def test_equal_ranks_keep_the_nearest_blocks() -> None:
    q, k = torch.ones(1, 1, 64, 8), torch.zeros(1, 1, 64, 8)
    for tokens in (40, 64):  # the same order in a longer row
        slots = torch.full((1, tokens // 4), 5)
        lists = select_blocks(
            q[:, :, :tokens],
            k[:, :, :tokens],
            None,
            slots,
            Visibility(True),
            block_q=4,
            block_k=4,
            scale=1.0,
            score="mean",
            local_tokens=4,
        )
        assert sorted(lists[0, 0, 9].tolist()) == [0, 6, 7, 8, 9]


def test_no_square_table_and_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_tiles, "TILE_ELEMENTS", 2**14)
    monkeypatch.setattr(probe_tiles, "TILE_ELEMENTS", 2**14)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                largest = max(largest, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    n = 512
    q, k, codebook = torch.randn(1, 2, n, 32, requires_grad=True), torch.randn(1, 2, n, 32), torch.randn(2, 4, 4, 8)
    with Watch():
        keys = select_keys(q, k, codebook, torch.full((1, n), 32), Visibility(True), score="match_count")
        for score in ("table", "attention"):
            blocks = select_blocks(
                q,
                k,
                codebook,
                torch.full((1, n // 32), 6),
                Visibility(True),
                block_q=32,
                block_k=32,
                scale=0.2,
                score=score,
            )
    assert not keys.requires_grad and not blocks.requires_grad
    assert largest < n * n / 2


def test_mistakes_say_what_was_asked_and_found() -> None:
    q, k, codebook = data()
    limit, slots, shape = torch.full((B, T), 8), torch.full((B, 8), 4), {"block_q": 4, "block_k": 4, "scale": 1.0}
    for call, message in (
        (lambda: select_keys(q, k, codebook, limit, Visibility(True), score="mean"), "score='mean'"),
        (lambda: select_keys(q, k, None, limit, Visibility(True)), "compares codes"),
        (lambda: select_keys(q, k[..., :8], None, limit, Visibility(True), score="attention"), "do not fit"),
        (lambda: select_keys(q, k[:, :, :5], codebook, limit, Visibility(True)), "29 queries and 5 keys"),
        (lambda: select_keys(q, k, codebook, limit[:, :3], Visibility(True)), "num_keys is"),
        (lambda: select_keys(q, k, codebook, limit, Visibility(True, torch.ones(B, 3))), "need integers"),
        (
            lambda: select_keys(
                q[..., :24],
                k[..., :24],
                codebook[:, :3],
                limit,
                Visibility(True),
                score="match_count",
                selection="bucket4",
            ),
            "4 sub-spaces",
        ),
        (lambda: select_blocks(q, k, codebook, slots, Visibility(True), score="top", **shape), "score='top'"),
        (lambda: select_blocks(q, k, codebook, slots, Visibility(True), num_probes=0, **shape), "num_probes=0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(Unsupported, match="triton"):
        select_keys(q, k, codebook, limit, Visibility(True), backend="triton")


def test_errors() -> None:
    q, k, codebook = data()
    with pytest.raises(ValueError, match="match_count"):
        select_keys(q, k, codebook, torch.full((B, T), 8), Visibility(True), selection="bucket4")
    with pytest.raises(ValueError, match="whole sequences"):
        select_blocks(q[:, :, -1:], k, codebook, torch.ones(B, 1), Visibility(True), block_q=4, block_k=4, scale=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("score", ["match_count", "table", "attention"])
def test_a_query_has_the_same_keys_alone_and_in_company(score: str, dtype: torch.dtype) -> None:
    for seed in range(5):
        draw = torch.Generator().manual_seed(seed)
        q, k = (torch.randn(2, h, 37, 16, generator=draw).to(dtype) for h in (4, 2))
        k[:, :, 5:30] = k[:, :, torch.arange(25) % 3]  # equal keys, which position alone may tell apart
        codebook = torch.randn(2, 2, 4, 8, generator=draw)
        limit, options = torch.full((2, 37), 6), {"score": score, "local_tokens": 0, "keep_first": False}
        whole = select_keys(q, k, codebook, limit, Visibility(False), **options)
        assert torch.equal(whole, select_keys(q, k, codebook, limit, Visibility(False), **options, backend="reference"))
        for row, last in ((0, 1), (0, 6), (1, 3)):
            one = slice(row, row + 1)
            found = select_keys(q[one, :, -last:], k[one], codebook, limit[one, -last:], Visibility(False), **options)
            assert torch.equal(found, whole[one, :, -last:])


@pytest.mark.parametrize("score", ["match_count", "table", "attention", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_block_has_the_same_blocks_alone_and_in_company(score: str, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    pool = torch.randn(3, 2, 8, 16, generator=draw)  # key blocks of three contents, so most ranks are ties
    k = torch.cat([pool[i] for i in torch.randint(0, 3, (13,), generator=draw)], 1)[None].to(dtype)
    q, codebook = torch.randn(1, 4, 104, 16, generator=draw).to(dtype), torch.randn(2, 2, 4, 8, generator=draw)

    def lists(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        slots = torch.full((len(q), -(-q.shape[2] // 8)), 5)
        options = {"block_q": 8, "block_k": 8, "scale": 0.3, "score": score, "local_tokens": 4}
        return select_blocks(q, k, codebook, slots, Visibility(True), **options)

    whole = lists(q, k)
    assert torch.equal(lists(torch.cat([q.flip(2), q]), torch.cat([k.flip(2), k]))[1:], whole)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lists(q, k), whole)
    for tokens in (48, 72, 96):
        found = lists(q[:, :, :tokens], k[:, :, :tokens])
        assert torch.equal(found, whole[:, :, : tokens // 8])


def test_the_first_key_is_forced_only_while_it_is_there() -> None:
    q, k, codebook = data()
    place = torch.arange(T).expand(B, -1)
    for dropped, first in ((0, 0), (7, -1)):
        visibility = Visibility(True, torch.ones(B, T, dtype=torch.int64), None, place + dropped)
        for backend in ("torch", "reference"):
            options = {"score": "match_count", "local_tokens": 1, "backend": backend}
            found = select_keys(q[:, :, -1:], k, codebook, torch.full((B, 1), 2), visibility, **options)
            assert (found[..., 0] == 0).all() if first == 0 else not (found[..., 0] == 0).all()


def test_codes_depend_on_their_own_vector() -> None:
    draw = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(1, 2, 61, 16, generator=draw), torch.randn(2, 2, 16, 8, generator=draw)
    # vectors half-way between two codewords, where rounding alone decides
    x[:, 0, :, :8] = (codebook[0, 0, :1] + codebook[0, 0, 1:2]) / 2 + x[:, 0, :, :8] * 1e-7
    for distance in ("l1", "l2"):
        whole = encode(x, codebook, distance)
        assert torch.equal(encode(x, codebook, distance, backend="reference"), whole)
        assert torch.equal(torch.cat([encode(x[:, :, i : i + 1], codebook, distance) for i in range(61)], 2), whole)


@pytest.mark.parametrize("score", ["table", "match_count", "mean"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_known_largest_list_gives_the_same_blocks_and_reads_nothing_on_the_host(score: str, causal: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    q, k = torch.randn(1, 4, 100, 16, generator=draw), torch.randn(1, 2, 100, 16, generator=draw)
    codebook, slots = torch.randn(2, 2, 16, 8, generator=draw), torch.randint(1, 6, (1, 13), generator=draw)
    for local_tokens in (0, 5, 40):
        options = {"block_q": 8, "block_k": 4, "scale": 0.25, "score": score, "local_tokens": local_tokens}
        wanted = select_blocks(q, k, codebook, slots, Visibility(causal), **options)
        found = select_blocks(q, k, codebook, slots, Visibility(causal), max_slots=5, **options)
        assert torch.equal(found[..., : wanted.shape[-1]], wanted) and (found[..., wanted.shape[-1] :] == -1).all()
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (q, k, codebook, slots)]
        assert select_blocks(*fake, Visibility(causal), max_slots=5, **options).shape == found.shape
        with pytest.raises(DataDependentOutputException):
            select_blocks(*fake, Visibility(causal), **options)
