"""Which keys a query attends to, from product-quantisation codes: single keys, or blocks of keys.

SPT, arXiv 2312.10365 (sparse attention). The block form is ours: choosing blocks keeps the attention's products large.
Legend: b batch, h query heads, g key/value heads (g divides h), t queries, s keys, d head width, m sub-spaces,
e codewords, i query blocks, n key blocks, l slots of a list (-1 = empty).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsetrain.ops.key_selection import blocks, reference, tokens

SCORES = ("match_count", "table")


@dataclass(frozen=True)
class Visibility:
    """Which keys a query may see. Positions count from the first key; t queries sit at the end of s keys.

    segments_bs: integers [b, s], 0 = padding, equal positive ids see each other; None: one segment.
    window: keys at a distance of `window` or more are invisible; None: no window.
    """

    causal: bool
    segments_bs: Tensor | None = None
    window: int | None = None


def select_keys(
    q_bhtd: Tensor,
    k_bgsd: Tensor,
    codebook_gmew: Tensor,
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
        `table` s(i, j) = sum_m <q_m, C[m, code_k(j)[m]]>, the query against the quantised key.
    selection: `exact` orders keys by (score descending, |i - j| ascending, j ascending); `bucket4` (published, match
        counts only): buckets min(3, s // (m // 4)); the keys whose rank among the visible ones is c modulo 4 give L / 4,
        from the highest bucket down, oldest first.

    Args:
        q_bhtd, k_bgsd: queries and keys as attention uses them.
        codebook_gmew: codewords of each key/value head, or one set [1, m, e, w] for all.
        num_keys_bt: integers [b, t], L of each query; fewer visible keys are all kept.
        local_tokens: the nearest keys (half on each side if not causal) are kept, counted inside L.
        keep_first: the first visible key of the segment is kept, counted inside L. The query itself always is, with
            `exact`.

    Returns:
        Key positions, int32 [b, h, t, max L], best first.

    Raises:
        ValueError: an option is unknown, or L does not hold the forced keys or is no multiple of 4 for `bucket4`.

    Cost: the scores of every visible pair, [t, s] a head, computed in tiles of bounded size.
    """
    if score not in SCORES or selection not in ("exact", "bucket4"):
        raise ValueError(f"score={score!r}, selection={selection!r}: choose from {SCORES} and ('exact', 'bucket4').")
    if selection == "bucket4" and score != "match_count":
        raise ValueError("selection='bucket4' sorts match counts into buckets. Set score='match_count'.")
    run = reference.select_keys if backend == "reference" else tokens.select_keys
    return run(
        q_bhtd,
        k_bgsd,
        codebook_gmew,
        num_keys_bt,
        visibility,
        score=score,
        selection=selection,
        distance=distance,
        local_tokens=local_tokens,
        keep_first=keep_first,
    )


@torch.no_grad()
def select_blocks(
    q_bhtd: Tensor,
    k_bgsd: Tensor,
    codebook_gmew: Tensor,
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
) -> Tensor:
    """The best key blocks of every query block; the query heads of a key/value head share one list.

    A key block is known by its histogram of codes, H[m, e]; a probe is a query that stands for its block. `table`
    estimates the attention mass that a probe p gives to a block, taking sub-spaces as independent:
        log mass = sum_m log sum_e H[m, e] exp(scale <p_m, C[m, e]>),  softmax over blocks, summed over probes and heads.
    `match_count` is sum_m H_probes[m, e] H[m, e], the pooled form of the published score.
    Probes of a causal block are the queries at distances 0, 4, 8, ... before its first: a choice that read later
    queries would let a token see the future through the keys it keeps. Otherwise they are spread over the block.
    Kept in any case: the blocks of the queries themselves, the `local_tokens` before (and after) them, and the first.

    Args:
        num_slots_bi: integers [b, i], blocks kept by each query block, forced ones included (and never fewer).
        visibility: sequences must start at block boundaries (`ops.segments.align_segments`).
        scale: of the attention scores.

    Returns:
        Block ids, int32 [b, g, i, l], best first, no id twice.

    Raises:
        ValueError: t != s, or an unknown score.

    Cost: per head 2·probes·i·n·m·e multiply-adds and probes·i·n logarithms; no tensor of [t, s].
    """
    if q_bhtd.shape[2] != k_bgsd.shape[2]:
        raise ValueError(
            f"{q_bhtd.shape[2]} queries and {k_bgsd.shape[2]} keys: blocks are chosen for whole sequences only. "
            "Decode with dense attention, or with granularity='token'."
        )
    if score not in SCORES:
        raise ValueError(f"score={score!r} is unknown. Choose from {SCORES}.")
    return blocks.select_blocks(
        q_bhtd,
        k_bgsd,
        codebook_gmew,
        num_slots_bi,
        visibility,
        block_q=block_q,
        block_k=block_k,
        scale=scale,
        score=score,
        distance=distance,
        local_tokens=local_tokens,
        keep_first=keep_first,
        num_probes=num_probes,
    )
