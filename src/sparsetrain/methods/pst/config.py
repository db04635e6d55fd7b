"""PST: what parameter-efficient sparse training is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from sparsetrain.core.config import MethodConfig, in_range, one_of

SCOPES = ("matrix", "global")
PATTERNS = ("unstructured", "2:4")
"""Those of `ops.masked_linear`, which is not imported here: a plan from the cache need not wait for torch."""


@dataclass(frozen=True, kw_only=True)
class PST(MethodConfig, method="pst"):
    """Prune every linear of the blocks while a few factors are trained (PST, arXiv 2205.11005).

    The defaults are those of the published code: 90 % zeros, ranks of 8, all scales 1.

    Args:
        keep_ratio: share of a weight's entries that is kept at the end, in (0, 1]. 1 keeps all and adds nothing.
        initial_keep_ratio: the share at the start; at least `keep_ratio`.
        first_ratio: share of the run's steps at its beginning that keep `initial_keep_ratio`.
        last_ratio: share at its end that keep `keep_ratio`. Between the two the share falls along a cubic.
        weight_rank: columns of U in W̃ = W + β U V.
        score_rank: columns of A in the score S = |W̃| + α₁ A B + α₂ (R 1ᵀ + 1 Cᵀ).
        weight_scale: β. score_scale: α₁. line_scale: α₂, of the scores of rows and columns.
        detach_magnitude: no gradient through |W̃| in the score.
        scope: `matrix`: each matrix keeps its share. `global`: all matrices together do, each what its scores earn at
            the step; that takes a copy of all scores once a step.
        pattern: `unstructured`, or `2:4`: two of every four consecutive inputs are 0 at the end (keep_ratio=0.5).
        train_head: train a classification head that is new in the model; the published code leaves it as it was drawn.
        train_norms: train the norms of the blocks too.
        decay_weight_factors: let weight decay act on U and V; on A, B, R and C it never does.
    """

    about: ClassVar[str] = (
        "Prunes the linears of the blocks while fine-tuning (keep_ratio; scope, pattern), training small factors of "
        "the weight and of the score that masks it, and no LoRA. For a pruned model at the end, with little to train "
        "and store. Not for speed: zeros are multiplied like other numbers, and a step costs more than LoRA's."
    )
    ops: ClassVar[tuple[str, ...]] = ("masked_linear", "topk_mask")
    trains_own: ClassVar[bool] = True
    stays_sparse: ClassVar[bool] = True

    keep_ratio: float = 0.1
    initial_keep_ratio: float = 1.0
    first_ratio: float = 0.1
    last_ratio: float = 0.3
    weight_rank: int = 8
    score_rank: int = 8
    weight_scale: float = 1.0
    score_scale: float = 1.0
    line_scale: float = 1.0
    detach_magnitude: bool = False
    scope: str = "matrix"
    pattern: str = "unstructured"
    train_head: bool = True
    train_norms: bool = False
    decay_weight_factors: bool = False

    @classmethod
    def dense_limit(cls) -> Self:
        return cls(keep_ratio=1.0)

    @classmethod
    def example(cls) -> Self:
        return cls(keep_ratio=0.3, initial_keep_ratio=0.5, weight_rank=2, score_rank=3)

    @property
    def is_dense(self) -> bool:
        """Nothing is ever masked."""
        return self.keep_ratio == 1

    @property
    def begins_dense(self) -> bool:
        return self.initial_keep_ratio == 1 and not self.is_dense

    def sparse_at_once(self) -> Self:
        return replace(self, initial_keep_ratio=self.keep_ratio) if self.begins_dense else self

    def keep_at(self, step: int, total_steps: int) -> float:
        """The share of entries kept after `step` optimizer steps of `total_steps`."""
        first, last = self.first_ratio * total_steps, (1 - self.last_ratio) * total_steps
        left = 1 - (step - first) / (last - first)
        if left < 1e-9:  # the ramp's end, whatever the rounding
            return self.keep_ratio
        return self.keep_ratio + (self.initial_keep_ratio - self.keep_ratio) * min(1.0, left) ** 3

    def check(self) -> None:
        super().check()
        name = self.method
        in_range(name, "keep_ratio", self.keep_ratio, 0, 1, low_open=True)
        in_range(name, "initial_keep_ratio", self.initial_keep_ratio, 0, 1, low_open=True)
        if self.initial_keep_ratio < self.keep_ratio:
            raise ValueError(
                f"{name}: initial_keep_ratio={self.initial_keep_ratio} is below keep_ratio={self.keep_ratio}, and "
                "training only prunes. Raise it, or leave it out."
            )
        for key in ("first_ratio", "last_ratio"):
            in_range(name, key, getattr(self, key), 0, 1)
        if self.first_ratio + self.last_ratio >= 1:
            raise ValueError(
                f"{name}: first_ratio={self.first_ratio} and last_ratio={self.last_ratio} leave no step between them, "
                "in which to prune. Lower one: together they must be below 1."
            )
        for key in ("weight_rank", "score_rank"):
            if getattr(self, key) < 1:
                raise ValueError(f"{name}: {key}={getattr(self, key)}; it must be at least 1.")
        one_of(name, "scope", self.scope, SCOPES)
        one_of(name, "pattern", self.pattern, PATTERNS)
        if self.pattern == "2:4" and self.keep_ratio != 0.5 and not self.is_dense:
            raise ValueError(
                f"{name}: pattern='2:4' keeps half of the weights, and keep_ratio={self.keep_ratio}. Give "
                "keep_ratio=0.5, or leave the pattern out."
            )
