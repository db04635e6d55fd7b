"""PQAttention: what product-quantised sparse attention is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from sparsetrain.core.config import DENSE_TOKENS, MethodConfig, in_range, one_of

SUBSPACE = 8
"""Width of one sub-space of the product quantiser (read in the official code)."""


@dataclass(frozen=True, kw_only=True)
class PQAttention(MethodConfig, method="pq_attention"):
    """Each query attends to L of n keys, chosen by comparing product-quantisation codes (arXiv 2312.10365).

    Args:
        granularity: `block` chooses blocks of keys for blocks of queries (the fast one); `token` chooses keys for each
            query (the paper's; saves quality, not time).
        keep_ratio: L = max(64, keep_ratio·n rounded up to 64), at most n. 1 is dense attention.
        num_keys: an absolute L for every length; prefix-consistent, so recommended for generation with a cache.
        block_q: tokens in a query block. block_k: in a key block (`block` only).
        selection: `exact` orders keys by (score, nearness); `bucket4` is the published approximation (`token` only).
        score: `table`, q against the quantised key; `match_count` (published), the number of equal codes; `attention`,
            no codes: exact scores (of a few probe queries a block with `block`), the ceiling of what codes can do.
        distance: metric of the codes: `l2`, or `l1` (published).
        num_codewords: E, codewords a sub-space.
        codebook_scope: `head`, one codebook a key/value head, or `layer`, one for all.
        codebook_init: `kmeans` on calibration tokens (k-medians for l1), or `normal`, N(0, 1).
        codebook_every: steps between updates of the codebooks; every step during the warm-up.
        codebook_weight: weight of the codebook loss.
        detach_qk: the codebook loss does not move q and k.
        local_tokens: the last keys (half on each side if bidirectional) that every query keeps; counted inside L.
        keep_first: every query keeps key 0; counted inside L.
        logit_clamp: clamp attention logits to ±this (`token`, paper only); None: no clamp.
        dense_below: sequences of fewer keys run dense, where sparse attention does not pay.
        warmup_ratio: share of the run with dense attention, in which codebooks learn. None: 0 with fitted codebooks,
            0.05 with random ones.
        dense_tokens: `targets`: in training, tokens that predict a label attend to every key, the others sparsely
            (SparseLoRA, arXiv 2506.16500). For rows of which few tokens are targets. `none`: all attend sparsely.
    """

    about: ClassVar[str] = (
        "Each query attends to the keys whose product-quantised codes match its own best (keep_ratio; "
        "granularity block is fast, token keeps more quality and saves no time). Not for short sequences, "
        "where choosing keys costs more than it saves, nor for head widths that 8 does not divide."
    )
    ops: ClassVar[tuple[str, ...]] = (
        "block_sparse_attention",
        "key_selection",
        "product_quantization",
        "segments",
        "token_sparse_attention",
    )

    granularity: str = "block"
    keep_ratio: float = 1 / 8
    num_keys: int | None = None
    block_q: int = 32
    block_k: int = 8
    selection: str = "exact"
    score: str = "table"
    distance: str = "l2"
    num_codewords: int = 16
    codebook_scope: str = "head"
    codebook_init: str = "kmeans"
    codebook_every: int = 20
    codebook_weight: float = 1e-2
    detach_qk: bool = True
    local_tokens: int = 16
    keep_first: bool = True
    logit_clamp: float | None = None
    dense_below: int = 0
    warmup_ratio: float | None = None
    dense_tokens: str = "none"

    @classmethod
    def paper(cls, **changes: object) -> Self:
        """The published choices: per-token keys in four buckets, one random codebook a layer, nothing forced."""
        published = {
            "granularity": "token",
            "selection": "bucket4",
            "score": "match_count",
            "distance": "l1",
            "codebook_scope": "layer",
            "codebook_init": "normal",
            "codebook_every": 1,
            "detach_qk": False,
            "local_tokens": 0,
            "keep_first": False,
            "logit_clamp": 10.0,
            "warmup_ratio": 0.0,
        }
        return cls(**{**published, **changes})  # type: ignore[arg-type]

    @classmethod
    def dense_limit(cls) -> Self:
        return cls(keep_ratio=1.0)

    @classmethod
    def example(cls) -> Self:
        return cls(num_keys=40, block_q=8, block_k=8, local_tokens=4)

    def shortest_trace(self) -> float:
        return 64 / self.keep_ratio  # at least 64 keys are kept

    def called_ops(self) -> tuple[str, ...]:
        other = "token_sparse_attention" if self.granularity == "block" else "block_sparse_attention"
        return tuple(op for op in self.ops if op != other)

    @property
    def needs_calibration(self) -> bool:
        return self.codebook_init == "kmeans" and self.keep_ratio < 1

    def warmup(self, fitted: bool) -> float:
        """The warm-up share in force."""
        if self.warmup_ratio is not None:
            return self.warmup_ratio
        return 0.0 if fitted else 0.05

    def kept_keys(self, num_tokens: int) -> int:
        """L for a sequence of `num_tokens` keys."""
        if self.num_keys is not None:
            return min(self.num_keys, num_tokens)
        if self.selection == "bucket4":
            return min(num_tokens, max(4, int(self.keep_ratio * num_tokens) // 4 * 4))
        return min(num_tokens, max(64, -(-int(self.keep_ratio * num_tokens + 0.999999) // 64) * 64))

    def check(self) -> None:
        super().check()
        name = "pq_attention"
        in_range(name, "keep_ratio", self.keep_ratio, 0, 1, low_open=True)
        one_of(name, "granularity", self.granularity, ("block", "token"))
        one_of(name, "selection", self.selection, ("exact", "bucket4"))
        one_of(name, "score", self.score, ("table", "match_count", "attention"))
        one_of(name, "distance", self.distance, ("l1", "l2"))
        one_of(name, "codebook_scope", self.codebook_scope, ("head", "layer"))
        one_of(name, "codebook_init", self.codebook_init, ("kmeans", "normal"))
        one_of(name, "dense_tokens", self.dense_tokens, DENSE_TOKENS)
        in_range(name, "num_codewords", self.num_codewords, 2, 256)
        in_range(name, "codebook_every", self.codebook_every, 1, 10**9)
        in_range(name, "codebook_weight", self.codebook_weight, 0, 1e6)
        if self.warmup_ratio is not None:
            in_range(name, "warmup_ratio", self.warmup_ratio, 0, 1)
        for field in ("block_q", "block_k"):
            if getattr(self, field) < 1:
                raise ValueError(f"{name}: {field}={getattr(self, field)}; it must be at least 1 token.")
        forced = self.local_tokens + int(self.keep_first)
        smallest = self.num_keys if self.num_keys is not None else 64
        if smallest < max(1, forced):
            raise ValueError(
                f"{name}: num_keys={self.num_keys} is smaller than the {forced} forced keys "
                f"(local_tokens={self.local_tokens}, keep_first={self.keep_first}). Raise num_keys or force fewer."
            )
        if self.selection == "bucket4" and self.granularity == "block":
            raise ValueError(f"{name}: selection='bucket4' chooses single keys. Set granularity='token'.")
        if self.selection == "bucket4" and self.score != "match_count":
            raise ValueError(f"{name}: selection='bucket4' sorts match counts. Set score='match_count'.")
        if self.selection == "bucket4" and self.num_keys is not None and self.num_keys % 4:
            raise ValueError(
                f"{name}: selection='bucket4' fills four classes, so num_keys={self.num_keys} % 4 must be 0."
            )

    def check_head(self, site: str, head_dim: int) -> None:
        """Raise ValueError if a head width cannot be cut into sub-spaces."""
        if head_dim % SUBSPACE:
            raise ValueError(
                f"pq_attention cannot take {site}: head width {head_dim} is not divisible by {SUBSPACE}, the width of "
                "a sub-space. Leave this model's attention dense."
            )
        if self.selection == "bucket4" and head_dim // SUBSPACE < 4:
            raise ValueError(
                f"pq_attention cannot take {site}: selection='bucket4' needs at least 4 sub-spaces, and head width "
                f"{head_dim} gives {head_dim // SUBSPACE}. Set selection='exact'."
            )
