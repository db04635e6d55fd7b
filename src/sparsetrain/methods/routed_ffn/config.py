"""RoutedFFN: what the routed feed-forward network is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from sparsetrain.core.config import DENSE_TOKENS, MethodConfig, in_range, one_of


@dataclass(frozen=True, kw_only=True)
class RoutedFFN(MethodConfig, method="routed_ffn"):
    """Cut each FFN into blocks and let every token use the blocks its router chooses (arXiv 2312.10365, routed FFN).

    Args:
        num_blocks: G, blocks that the routed hidden units are cut into.
        num_active: G', blocks a token uses. G' = G is the dense FFN.
        shared_ratio: share of the hidden units that every token uses (they are not routed). With `clustered` they are
            the units of largest mean and maximum contribution; the share is rounded up so that the rest divides by G.
        partition: `contiguous` (published) or `clustered`: units that fire together share a block. Needs calibration.
        compensation: what stands in for the blocks a token drops: `none` (published), `mean` (their mean output), or
            `lowrank` (the mean and a linear map of rank `compensation_rank`). Needs `partition="clustered"`.
            None: `lowrank` if clustered, else `none`.
        compensation_rank: rank of that map; at most the model's width.
        gate: `output` multiplies a block's output by c = 2σ(router logit); `ste` uses 1 with the gradient of c; `spt`
            is the published form (c on every base product, LoRA ungated). None: `ste` if clustered (the conversion is
            fitted for gates of 1), else `output`.
        balance_weight: weight of the load-balance loss; 1 at uniform load (Shazeer-style f·u).
        rescale: multiply the routed part by G / G'.
        warmup_ratio: share of the run in which all blocks run, gated, so that the router learns first. None: 0 for a
            router that calibration has fitted, 0.05 for a random one.
        dense_tokens: `targets`: in training, tokens that predict a label go through the dense FFN; the others are
            routed, and count for the router alone (SparseLoRA, arXiv 2506.16500). For rows of which few tokens are
            targets. `none`: all tokens are routed.
    """

    about: ClassVar[str] = (
        "A router gives each token num_active of num_blocks blocks of every FFN (shared_ratio; partition "
        "clustered is fitted to the model, contiguous is the published start). Not for mixture-of-experts "
        "models, which are routed already."
    )
    ops: ClassVar[tuple[str, ...]] = ("routed_ffn", "routing")

    num_blocks: int = 4
    num_active: int = 2
    shared_ratio: float = 0.0
    partition: str = "contiguous"
    compensation: str | None = None
    compensation_rank: int = 64
    gate: str | None = None
    balance_weight: float = 1e-2
    rescale: bool = False
    warmup_ratio: float | None = None
    dense_tokens: str = "none"

    @classmethod
    def paper(cls, **changes: object) -> Self:
        """The published choices: 4 contiguous blocks, 2 active, `spt` gate, no balance loss, sparse from step 0."""
        return cls(**{"gate": "spt", "balance_weight": 0.0, "warmup_ratio": 0.0, **changes})  # type: ignore[arg-type]

    @classmethod
    def converted(cls, **changes: object) -> Self:
        """Five eighths of the hidden units, in the later blocks, at little loss.

        Half of the units is always on, 1 of 4 clustered blocks is routed, and a low-rank map makes up for the rest. On
        SmolLM2-135M, all 30 blocks: 1.37 times the dense perplexity before any training; `sparsetrain sensitivity`
        finds the blocks that cost least.
        """
        chosen: dict[str, object] = {"num_blocks": 4, "num_active": 1, "shared_ratio": 1 / 2, "partition": "clustered"}
        chosen |= {"compensation_rank": 96, "from_depth": 0.3}
        return cls(**{**chosen, **changes})  # type: ignore[arg-type]

    @classmethod
    def dense_limit(cls) -> Self:
        return cls(num_blocks=4, num_active=4)

    @classmethod
    def example(cls) -> Self:
        return cls(num_blocks=4, num_active=2, shared_ratio=0.25, partition="clustered", compensation_rank=4)

    @property
    def active_ratio(self) -> float:
        """β: share of the hidden units a token uses."""
        return self.shared_ratio + (1 - self.shared_ratio) * self.num_active / self.num_blocks

    @property
    def needs_calibration(self) -> bool:
        return self.partition == "clustered"

    @property
    def gated_by(self) -> str:
        """The gate in force."""
        return self.gate or ("ste" if self.needs_calibration else "output")

    @property
    def compensated_by(self) -> str:
        """The compensation in force."""
        return self.compensation or ("lowrank" if self.needs_calibration else "none")

    def rank(self, hidden_size: int) -> int:
        """Rank of the compensating map in a model of `hidden_size` channels; 0 if there is none."""
        return min(self.compensation_rank, hidden_size) if self.compensated_by == "lowrank" else 0

    def warmup(self) -> float:
        """The warm-up share in force."""
        if self.warmup_ratio is not None:
            return self.warmup_ratio
        return 0.0 if self.needs_calibration else 0.05

    def split(self, ffn_size: int) -> tuple[int, int]:
        """(always-on units, width of a block) of an FFN with `ffn_size` hidden units.

        Raises:
            ValueError: the hidden units do not divide into the blocks.
        """
        if self.shared_ratio == 0 and ffn_size % self.num_blocks:
            divisors = [g for g in range(1, 65) if ffn_size % g == 0]
            raise ValueError(
                f"routed_ffn: {ffn_size} hidden units do not divide into num_blocks={self.num_blocks}. "
                f"Choose num_blocks from {divisors}, or set shared_ratio > 0, which takes up the remainder."
            )
        # 1536 · (1 − 1/3) must give 1024 whatever the rounding
        width = int(ffn_size * (1 - self.shared_ratio) + 1e-6) // self.num_blocks
        if width < 1:
            raise ValueError(
                f"routed_ffn: {ffn_size} hidden units with shared_ratio={self.shared_ratio} leave nothing for "
                f"num_blocks={self.num_blocks}. Lower one of them."
            )
        return ffn_size - width * self.num_blocks, width

    def check(self) -> None:
        super().check()
        if self.num_blocks < 1:
            raise ValueError(f"routed_ffn: num_blocks={self.num_blocks}; it must be at least 1.")
        if not 1 <= self.num_active <= self.num_blocks:
            raise ValueError(
                f"routed_ffn: num_active={self.num_active} is outside 1..num_blocks={self.num_blocks}. "
                "A token uses at least one block and at most all."
            )
        if not 0 <= self.shared_ratio < 1:
            raise ValueError(f"routed_ffn: shared_ratio={self.shared_ratio} is out of range. It must lie in [0, 1).")
        one_of("routed_ffn", "partition", self.partition, ("contiguous", "clustered"))
        one_of("routed_ffn", "compensation", self.compensated_by, ("none", "mean", "lowrank"))
        one_of("routed_ffn", "gate", self.gated_by, ("output", "ste", "spt"))
        one_of("routed_ffn", "dense_tokens", self.dense_tokens, DENSE_TOKENS)
        if self.compensated_by != "none" and self.partition != "clustered":
            raise ValueError(
                f"routed_ffn: compensation={self.compensation!r} is fitted on calibration data, and "
                f"partition={self.partition!r} uses none. Set partition='clustered', or compensation='none'."
            )
        if self.gate == "spt" and self.shared_ratio > 0:
            raise ValueError("routed_ffn: gate='spt' gates every unit, so shared_ratio must be 0. Use gate='output'.")
        in_range("routed_ffn", "compensation_rank", self.compensation_rank, 1, 4096)
        in_range("routed_ffn", "balance_weight", self.balance_weight, 0, 1e6)
        if self.warmup_ratio is not None:
            in_range("routed_ffn", "warmup_ratio", self.warmup_ratio, 0, 1)
