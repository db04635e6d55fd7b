"""Which keys a query attends to, from product-quantisation codes: single keys, or blocks of keys.

SPT, arXiv 2312.10365 (sparse attention). The block form is ours: choosing blocks keeps the attention's products large.
Legend: b batch, h query heads, g key/value heads (g divides h), t queries, s keys, d head width, m sub-spaces,
e codewords, i query blocks, n key blocks, l slots of a list (-1 = empty).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain.core.backend import choose
from sparsetrain.ops.key_selection import blocks, keys, reference
from sparsetrain.ops.key_selection.visibility import Visibility as Visibility
from sparsetrain.ops.key_selection.visibility import sequences
from sparsetrain.ops.product_quantization import encode
from sparsetrain.ops.qkv import check_heads, check_segments

KEY_SCORES = ("match_count", "table", "attention")
BLOCK_SCORES = (*KEY_SCORES, "mean")
_RUN = {"torch": keys.select, "reference": reference.select_keys}


@torch.no_grad()
def select_keys(
    q_bhtd: Tensor,
    k_bgsd: Tensor,
    codebook_gmew: Tensor | None,
    num_keys_bt: Tensor,
    visibility: Visibility,
    *,
    score: str = "table",
    selection: str = "exact",
    distance: str = "l2",
    local_tokens: int = 16,
    keep_first: bool = True,
    backend: str = "auto",
) -> Tensor:
    """The L best visible keys of every query.

    score: `match_count` s(i, j) = number of sub-spaces where the codes of q_i and k_j agree (published);
        `table` s(i, j) = sum_m <q_m, C[m, code_k(j)[m]]>, the query against the quantised key;
        `attention` s(i, j) = <q_i, k_j>, the best keys there are, at the cost of dense scores.
    selection: `exact` orders keys by (score descending, |i - j| ascending, j ascending); `bucket4` (published, match
        counts only): buckets min(3, s // (m // 4)); keys whose rank among the visible ones is c modulo 4 give L / 4,
        from the highest bucket down, oldest first.

    Forced keys come first in either order; where L does not hold them all, the order decides among them.
    A score is a function of its query and its key alone, to the last bit, and ties are broken by position alone: a
    query has the same list in any company. Unlike the published code, no unused slot counts as key 0.

    Args:
        q_bhtd, k_bgsd: queries and keys as attention uses them.
        codebook_gmew: codewords of each key/value head, or one set [1, m, e, w] for all; unused by `attention`.
        num_keys_bt: integers [b, t], L of each query; fewer visible keys are all kept.
        local_tokens: the nearest keys (half on each side if not causal) are kept, counted inside L.
        keep_first: the first key of the segment, where it is visible, is kept, counted inside L.
        backend: auto | reference | torch; `torch` is plain PyTorch in tiles and runs on any device.

    Returns:
        Key positions, int32 [b, h, t, max L], ascending, then -1.

    Raises:
        ValueError: an option is unknown, shapes do not fit, or `bucket4` has fewer than 4 sub-spaces.
        Unsupported: the named backend cannot run this call.

    Cost: the scores of every visible pair, one byte each for match counts, in tiles of about a million; never a
    [t, s] tensor. Each call waits for the device once, to read the largest L (and once a tile for products).
    """
    _check_selection(score, selection, codebook_gmew)
    _check(q_bhtd, k_bgsd, codebook_gmew, score, visibility)
    _check_limits(num_keys_bt, q_bhtd)
    compared = keys.Compared(q_bhtd, k_bgsd)
    if score != "attention":
        assert codebook_gmew is not None
        codes_bgsm = encode(k_bgsd, codebook_gmew, distance)
        compared = keys.Compared(q_bhtd, codes_bgsm, None, codebook_gmew)
        if score == "match_count":
            num_levels = 4 if selection == "bucket4" else codebook_gmew.shape[1] + 1
            compared = keys.Compared(encode(q_bhtd, codebook_gmew, distance), codes_bgsm, num_levels)
    rule = keys.Rule(visibility, selection, local_tokens, keep_first)
    run = _RUN[choose("key_selection", backend, {"torch": None, "reference": None})]
    seq = sequences(visibility, len(k_bgsd), k_bgsd.shape[2], k_bgsd.device)
    return run(compared, num_keys_bt, rule, seq)


@torch.no_grad()
def select_blocks(
    q_bhtd: Tensor,
    k_bgsd: Tensor,
    codebook_gmew: Tensor | None,
    num_slots_bi: Tensor,
    visibility: Visibility,
    *,
    block_q: int,
    block_k: int,
    scale: float,
    score: str = "table",
    distance: str = "l2",
    local_tokens: int = 16,
    keep_first: bool = True,
    num_probes: int = 4,
    max_slots: int | None = None,
) -> Tensor:
    """The best key blocks of every query block; the query heads of a key/value head share one list.

    A key block is known by its histogram of codes, H[m, e]; a probe is a query that stands for its block. `table`
    estimates the attention mass that a probe p gives to a block, taking sub-spaces as independent:
        log mass = sum_m log sum_e H[m, e] exp(scale <p_m, C[m, e]>), softmax over blocks, summed over probes and heads.
    `attention` is that mass itself, with every key read. `mean` is the mean probe times the mean key of the block.
    `match_count` is sum_m H_probes[m, e] H[m, e], the pooled form of the published score.
    Probes of a causal block are the queries at distances 0, 4, 8, ... before its first: a choice that read later
    queries would let a token see the future through the keys it keeps. Otherwise they are spread over the block.
    Kept in any case: the blocks of the queries themselves, the `local_tokens` before (and after) them, and the first.

    Args:
        num_slots_bi: integers [b, i], blocks kept by each query block, forced ones included (and never fewer).
        visibility: sequences must start at block boundaries (`ops.segments.align_segments`).
        scale: of the attention scores.
        max_slots: no entry of `num_slots_bi` is larger. With it the host does not wait for the largest, and l may be
            more than that, with empty slots.

    Returns:
        Block ids, int32 [b, g, i, l], best first, then -1, no id twice.

    Raises:
        ValueError: t != s, or an unknown score.

    Cost: `table`: per head 2·probes·i·n·m·e multiply-adds and probes·i·n logarithms; `attention`: probes / block_q of
    the dense scores and their softmax, in tiles of 1 MiB. No tensor of [t, s].
    """
    if q_bhtd.shape[2] != k_bgsd.shape[2]:
        raise ValueError(
            f"{q_bhtd.shape[2]} queries and {k_bgsd.shape[2]} keys: blocks are chosen for whole sequences only. "
            "Decode with dense attention, or with granularity='token'."
        )
    if score not in BLOCK_SCORES:
        raise ValueError(f"score={score!r} is unknown. Choose from {BLOCK_SCORES}.")
    _check(q_bhtd, k_bgsd, None if score == "mean" else codebook_gmew, score, visibility)
    if min(block_q, block_k, num_probes) < 1:
        raise ValueError(f"block_q={block_q}, block_k={block_k}, num_probes={num_probes}: give at least 1 of each.")
    rule = blocks.BlockRule(
        visibility, block_q, block_k, scale, score, distance, local_tokens, keep_first, num_probes, max_slots
    )
    with torch.autocast(q_bhtd.device.type, enabled=False):  # it would rank blocks by bf16 scores
        return blocks.select(q_bhtd, k_bgsd, codebook_gmew, num_slots_bi, rule)


def _check_selection(score: str, selection: str, codebook: Tensor | None) -> None:
    if score not in KEY_SCORES or selection not in ("exact", "bucket4"):
        raise ValueError(
            f"score={score!r}, selection={selection!r}: choose from {KEY_SCORES} and ('exact', 'bucket4')."
        )
    if selection == "bucket4" and score != "match_count":
        raise ValueError("selection='bucket4' sorts match counts into buckets. Set score='match_count'.")
    if selection == "bucket4" and codebook is not None and codebook.shape[1] < 4:
        raise ValueError(f"selection='bucket4' needs 4 sub-spaces or more, and the codebook has {codebook.shape[1]}.")


def _check_limits(num_keys: Tensor, q: Tensor) -> None:
    if num_keys.shape != (q.shape[0], q.shape[2]):
        raise ValueError(f"num_keys is {list(num_keys.shape)}; need [{q.shape[0]}, {q.shape[2]}].")


def _check(q: Tensor, k: Tensor, codebook: Tensor | None, score: str, visibility: Visibility) -> None:
    check_heads(q, k)
    if q.shape[2] > k.shape[2] or q.shape[2] == 0:
        raise ValueError(f"{q.shape[2]} queries and {k.shape[2]} keys: queries sit at the end of the keys.")
    if codebook is None and score in ("match_count", "table"):
        raise ValueError(f"score={score!r} compares codes. Pass a codebook [{k.shape[1]} or 1, m, e, w].")
    check_segments(visibility.segments_bs, k)
    check_segments(visibility.places_bs, k)
