from __future__ import annotations

import pytest
import torch

from sparsetrain.ops.key_selection import Visibility, select_blocks, select_keys
from sparsetrain.ops.product_quantization import encode

B, H, G, T, D = 2, 4, 2, 29, 32


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(B, H, T, D, generator=generator),
        torch.randn(B, G, T, D, generator=generator),
        torch.randn(G, D // 8, 6, 8, generator=generator),
    )


def segments() -> torch.Tensor:
    return torch.tensor([[0] * 3 + [1] * 11 + [2] * 15, [1] * 20 + [0] * 9])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("score", ["match_count", "table"])
@pytest.mark.parametrize("window", [None, 9])
def test_exact_selection_equals_the_rule(causal: bool, packed: bool, score: str, window: int | None) -> None:
    q, k, codebook = data()
    visibility = Visibility(causal, segments() if packed else None, window)
    limit = torch.full((B, T), 8)
    limit[1] = 5
    options = {"score": score, "local_tokens": 3}
    found = select_keys(q, k, codebook, limit, visibility, **options)
    expected = select_keys(q, k, codebook, limit, visibility, **options, backend="reference")
    assert torch.equal(found.sort(-1).values, expected.sort(-1).values)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_bucket4_equals_the_rule(causal: bool, packed: bool) -> None:
    q, k, codebook = data()
    visibility = Visibility(causal, segments() if packed else None)
    limit = torch.full((B, T), 8)
    options = {"score": "match_count", "selection": "bucket4"}
    found = select_keys(q, k, codebook, limit, visibility, **options)
    expected = select_keys(q, k, codebook, limit, visibility, **options, backend="reference")
    assert torch.equal(found.sort(-1).values, expected.sort(-1).values)


def test_equal_codes_keep_the_newest_keys() -> None:
    q, k = torch.ones(1, 1, 20, 32), torch.ones(1, 1, 20, 32)
    codebook = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    limit = torch.full((1, 20), 5)
    keys = select_keys(
        q, k, codebook, limit, Visibility(True), score="match_count", local_tokens=0, keep_first=False
    )
    assert keys[0, 0, 19].tolist() == [19, 18, 17, 16, 15]
    assert keys[0, 0, 1].tolist() == [1, 0, -1, -1, -1]


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
@pytest.mark.parametrize("score", ["table", "match_count"])
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
    q[:, :, 17:], k[:, :, 16:] = torch.randn(B, H, 12, D), torch.randn(B, G, 13, D)
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


def test_errors() -> None:
    q, k, codebook = data()
    with pytest.raises(ValueError, match="match_count"):
        select_keys(q, k, codebook, torch.full((B, T), 8), Visibility(True), selection="bucket4")
    with pytest.raises(ValueError, match="whole sequences"):
        select_blocks(
            q[:, :, -1:], k, codebook, torch.ones(B, 1), Visibility(True), block_q=4, block_k=4, scale=1.0
        )
