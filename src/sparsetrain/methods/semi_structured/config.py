"""SemiStructured: what 2:4 training is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from sparsetrain.core.config import MethodConfig, in_range, one_of

WGRADS = ("dense", "mvue")
"""Those of `ops.sparse24_linear`, which is not imported here: a plan from the cache need not wait for torch."""

MASK_MODES = ("transposable", "greedy", "row", "soft")
BACKENDS = ("auto", "emulate", "cusparselt", "cutlass")


@dataclass(frozen=True, kw_only=True)
class SemiStructured(MethodConfig, method="semi_structured"):
    """Train FFN linears with 2:4 weights over a dense master (FST, arXiv 2404.01847; S-STE, arXiv 2409.09099).

    The defaults are FST with a dense weight gradient. Made for pre-training: pruning a trained FFN hurts.

    Args:
        mask_mode: `transposable` (2:4 along both dimensions, the best of 90 patterns a tile), `greedy` (the same,
            chosen greedily), `row` (2:4 along the inputs: more weight kept, but the input gradient is a dense product),
            or `soft` (S-STE: β times the soft threshold, along the inputs, anew every step).
        wgrad: `dense`, or `mvue`: the output gradient is drawn 2:4 (unbiased), so that dW is a sparse product too.
        refresh_every: optimizer steps between masks. `soft` has no mask to refresh; its flips are counted this often.
        decay: λ of masked decay: g ← g + λ (1 − M) ∘ w, after clipping, before the optimizer. Tune it: `find_decay`.
            None: 6e-5, and 0 for `soft`.
        dense_tail_ratio: share of the run, at its end, in which the dense weights train. None: 1/6, and 0 for `soft`.
            1 is dense throughout, with flips counted as if there were masks.
        backend: `auto` times the model's own shapes on a GPU when training begins, uses sparse tensor cores where an
            FFN gains at least 1.15x, and is refused with the numbers where it does not; on a CPU it is `emulate`: the
            same numbers from dense products, without speed. `cusparselt`, `cutlass`: those, untimed, or an error.
        tokens: rows of one forward (batch size times sequence length) at which `auto` times.
        seed: of the `mvue` draws, with the step, the linear and the rank.
    """

    about: ClassVar[str] = (
        "Trains FFN linears with two of every four weights zero over a dense master (mask_mode, wgrad; "
        "dense_tail_ratio). For pre-training on a GPU with sparse tensor cores; elsewhere it is emulated, "
        "without speed. Not for fine-tuning: pruning a trained FFN hurts."
    )
    ops: ClassVar[tuple[str, ...]] = ("nm_mask", "soft_threshold24", "sparse24_linear")

    mask_mode: str = "transposable"
    wgrad: str = "dense"
    refresh_every: int = 40
    decay: float | None = None
    dense_tail_ratio: float | None = None
    backend: str = "auto"
    tokens: int = 8192
    seed: int = 0

    @classmethod
    def _changed(cls, chosen: dict[str, Any], changes: dict[str, Any]) -> Self:
        return cls(**{**chosen, **changes})

    @classmethod
    def fst(cls, **changes: Any) -> Self:
        """FST as published: transposable masks every 40 steps, MVUE, masked decay, a dense tail of 1/6."""
        return cls._changed({"wgrad": "mvue"}, changes)

    @classmethod
    def fst_without_tail(cls, **changes: Any) -> Self:
        """Control: FST that stays sparse to the end."""
        return cls._changed({"wgrad": "mvue", "dense_tail_ratio": 0.0}, changes)

    @classmethod
    def s_ste(cls, **changes: Any) -> Self:
        """S-STE as published: soft threshold every step, β frozen at the start, MVUE, sparse to the end."""
        return cls._changed({"mask_mode": "soft", "wgrad": "mvue"}, changes)

    @classmethod
    def ste(cls, **changes: Any) -> Self:
        """Control: the plain straight-through estimator, a row mask every step."""
        chosen = {"mask_mode": "row", "refresh_every": 1, "decay": 0.0, "dense_tail_ratio": 0.0}
        return cls._changed(chosen, changes)

    @classmethod
    def sr_ste(cls, **changes: Any) -> Self:
        """Control: SR-STE (arXiv 2102.04010), the straight-through estimator with λ = 2e-4 on pruned weights."""
        chosen = {"mask_mode": "row", "refresh_every": 1, "decay": 2e-4, "dense_tail_ratio": 0.0}
        return cls._changed(chosen, changes)

    @classmethod
    def dense_limit(cls) -> Self:
        return cls(dense_tail_ratio=1.0, decay=0.0)

    @property
    def decay_in_force(self) -> float:
        """λ."""
        return self.decay if self.decay is not None else 0.0 if self.mask_mode == "soft" else 6e-5

    @property
    def tail_in_force(self) -> float:
        """Share of the run with dense weights, at its end."""
        return (
            self.dense_tail_ratio if self.dense_tail_ratio is not None else 0.0 if self.mask_mode == "soft" else 1 / 6
        )

    @property
    def transposable(self) -> bool:
        """Whether the transpose is 2:4 too."""
        return self.mask_mode in ("transposable", "greedy")

    def first_dense_step(self, total_steps: int) -> int:
        """⌊(1 − dense_tail_ratio) · total⌋: from this optimizer step on, the dense weights train."""
        # 300,000 · (1 − 1/6) must give 250,000 whatever the rounding
        return int((1 - self.tail_in_force) * total_steps + 1e-6)

    def check(self) -> None:
        super().check()
        name = self.method
        one_of(name, "mask_mode", self.mask_mode, MASK_MODES)
        one_of(name, "wgrad", self.wgrad, WGRADS)
        one_of(name, "backend", self.backend, BACKENDS)
        in_range(name, "decay", self.decay_in_force, 0, 1)
        in_range(name, "dense_tail_ratio", self.tail_in_force, 0, 1)
        for key in ("refresh_every", "tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"{name}: {key}={getattr(self, key)}; it must be at least 1.")
        if self.mask_mode == "soft" and (self.decay or self.dense_tail_ratio):
            given = {key: v for key in ("decay", "dense_tail_ratio") if (v := getattr(self, key))}
            raise ValueError(
                f"{name}: mask_mode='soft' with {given}: S-STE's threshold shrinks weights by itself and it ends "
                "sparse. Leave them out, or choose another mask_mode."
            )
