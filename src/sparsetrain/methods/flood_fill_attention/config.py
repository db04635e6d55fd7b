"""FloodFillAttention: what flood-fill block patterns are asked to do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from sparsetrain.core.config import MethodConfig, in_range, one_of

VARIANTS = ("cf", "c", "f", "top_q", "window")
"""Those of `ops.attention_patterns`, which is not imported here: a plan from the cache need not wait for torch."""
CONVOLVED = ("cf", "c")
"""Variants that read the map after the diagonal convolution."""

MIN_PROBES = 3
"""The switch rule compares two distances, and a distance compares two maps."""


@dataclass(frozen=True, kw_only=True)
class FloodFillAttention(MethodConfig, method="flood_fill_attention"):
    """Train dense, cut a block pattern from each layer's mean attention map, train on with it (arXiv 2309.12578).

    Args:
        variant: `cf`, diagonal convolution and flood fill; `c`, convolution and the largest blocks; `f`, flood fill
            without convolution; and two controls of ours: `top_q`, the largest blocks; `window`, the nearest blocks.
        block_tokens: tokens of a block edge.
        filter_edge: edge of the diagonal filter, odd.
        quantile: threshold of the pattern over the map's cells, in [0, 1). None: 0.98, unless keep_ratio is set.
        keep_ratio: kept / visible blocks, at most this (the diagonal is always kept). 1 is dense attention.
        softmax: `masked` over kept keys; `phantom_zero` (published) counts pruned keys as zero logits.
        probe_every: steps between looks at the maps. None: a twentieth of the run.
        probe_rows: rows of the calibration data that are looked at: the longest ones, always the same, no dropout.
        reference: what a map is compared with: the `previous` probe's, or the `official` code's irregular choice.
        change_threshold: all layers switch when the distance between maps changes by less than this many percent in
            every layer. 0: never; only the cap switches then.
        max_dense_steps: switch after so many steps whatever the maps do. 0: at the conversion, from the calibration
            data, for a model that is trained already. None: after max_dense_ratio of the run.
        max_dense_ratio: as a share of the run; 1 may stay dense to the end.
        share_heads: one pattern a layer; else one a key/value head.
        row_normalise: weigh every row of a causal map alike (early rows see few keys, so theirs are large).
        extend: sequences longer than the pattern: `error`, or `diagonal`, which carries its last row on.
        restart_lr: the Trainer's learning-rate schedule starts over at the switch (published for `cf` and `c`).
    """

    about: ClassVar[str] = (
        "Trains dense until the attention maps settle, then keeps a fixed block pattern of each layer's map "
        "(quantile or keep_ratio; block_tokens). For training on long rows of one length. Not for chat or "
        "generation, where what matters moves with the content."
    )
    ops: ClassVar[tuple[str, ...]] = ("attention_patterns", "block_sparse_attention", "segments")

    variant: str = "cf"
    block_tokens: int = 64
    filter_edge: int = 31
    quantile: float | None = None
    keep_ratio: float | None = None
    softmax: str = "masked"
    probe_every: int | None = None
    probe_rows: int = 2
    reference: str = "previous"
    change_threshold: float = 15.0
    max_dense_steps: int | None = None
    max_dense_ratio: float = 0.5
    share_heads: bool = True
    row_normalise: bool = False
    extend: str = "error"
    restart_lr: bool = False

    @classmethod
    def paper(cls, **changes: object) -> Self:
        """The published choices; block_tokens, quantile and probe_every differ by task (see the README)."""
        published = {
            "variant": "cf",
            "softmax": "phantom_zero",
            "reference": "official",
            "max_dense_ratio": 1.0,
            "restart_lr": changes.get("variant", "cf") in CONVOLVED,
        }
        return cls(**{**published, **changes})  # type: ignore[arg-type]

    @classmethod
    def dense_limit(cls) -> Self:
        return cls(keep_ratio=1.0)

    @classmethod
    def example(cls) -> Self:
        return cls(block_tokens=8, filter_edge=5, quantile=0.6, max_dense_steps=0)

    def shortest_trace(self) -> float:
        return 64 / (self.keep_ratio or 1.0)

    @property
    def begins_dense(self) -> bool:
        return self.max_dense_steps is None

    def sparse_at_once(self) -> Self:
        return replace(self, max_dense_steps=0) if self.begins_dense and not self.is_dense else self

    @property
    def is_dense(self) -> bool:
        """Nothing is ever pruned."""
        return self.keep_ratio == 1

    @property
    def edge_in_force(self) -> int:
        """The filter's edge, 1 for variants that read the map as it is."""
        return self.filter_edge if self.variant in CONVOLVED else 1

    @property
    def target(self) -> dict[str, float]:
        """The one target in force, as `block_pattern` takes it."""
        if self.keep_ratio is not None:
            return {"keep_ratio": self.keep_ratio}
        return {"quantile": 0.98 if self.quantile is None else self.quantile}

    @property
    def target_ratio(self) -> float:
        """About which share of the visible blocks is kept, before the diagonal is added."""
        return self.keep_ratio if self.keep_ratio is not None else 1 - self.target["quantile"]

    def probe_interval(self, total_steps: int | None) -> int:
        """Steps between probes.

        Raises:
            ValueError: probe_every is a share of the run, and its length is not known.
        """
        if self.probe_every is not None:
            return self.probe_every
        if total_steps is None:
            raise ValueError(
                "flood_fill_attention: probe_every=None is a twentieth of the run, and handle.step() was not told its "
                "length. Call handle.step(step, total_steps), or set probe_every."
            )
        return max(1, total_steps // 20)

    def last_dense_step(self, total_steps: int | None) -> int | None:
        """The step at which the cap switches, or None.

        Raises:
            ValueError: the cap leaves no room for the probes that the rule needs.
        """
        if self.max_dense_steps is not None:
            cap = self.max_dense_steps
        elif total_steps is None or self.max_dense_ratio == 1:
            return None
        else:
            cap = max(1, int(self.max_dense_ratio * total_steps))
        needed = MIN_PROBES * self.probe_interval(total_steps)
        if cap and self.change_threshold > 0 and cap < needed:
            raise ValueError(
                f"flood_fill_attention: the dense phase ends at step {cap}, before the {MIN_PROBES} probes that the "
                f"switch rule needs (one each {self.probe_interval(total_steps)} steps). Lower probe_every, lengthen "
                "the dense phase (max_dense_steps, max_dense_ratio), or set change_threshold=0 to switch at that step."
            )
        return cap

    def check(self) -> None:
        super().check()
        name = "flood_fill_attention"
        one_of(name, "variant", self.variant, VARIANTS)
        one_of(name, "softmax", self.softmax, ("masked", "phantom_zero"))
        one_of(name, "reference", self.reference, ("previous", "official"))
        one_of(name, "extend", self.extend, ("error", "diagonal"))
        if self.quantile is not None and self.keep_ratio is not None:
            raise ValueError(
                f"{name}: quantile={self.quantile} and keep_ratio={self.keep_ratio} both say what to keep. Give one."
            )
        if self.quantile is not None and not 0 <= self.quantile < 1:
            raise ValueError(f"{name}: quantile={self.quantile} is out of range. It must lie in [0, 1).")
        if self.keep_ratio is not None:
            in_range(name, "keep_ratio", self.keep_ratio, 0, 1, low_open=True)
        in_range(name, "max_dense_ratio", self.max_dense_ratio, 0, 1, low_open=True)
        in_range(name, "change_threshold", self.change_threshold, 0, 1e9)
        for field, low in (("block_tokens", 1), ("probe_rows", 1), ("probe_every", 1), ("max_dense_steps", 0)):
            value = getattr(self, field)
            if value is not None and value < low:
                raise ValueError(f"{name}: {field}={value}; it must be at least {low}.")
        if self.filter_edge < 1 or self.filter_edge % 2 == 0:
            raise ValueError(
                f"{name}: filter_edge={self.filter_edge}, and the filter needs a middle cell. Give an odd number, "
                "such as 31."
            )
        if self.max_dense_steps is not None and self.probe_every is not None:
            self.last_dense_step(None)
