"""SaRA: which entries of a model's weights are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from sparsetrain.core.config import MethodConfig, in_range, one_of

SCOPES = ("linears", "all")
BLOCKS = ("entries", "rows", "tiles")
RANK_MODES = ("random1", "all")
TILE = 64
DEFAULT_FRACTION = 0.1
DECAY = 0.01


@dataclass(frozen=True, kw_only=True)
class SaRA(MethodConfig, method="sara"):
    """Train the entries of the weights that are smallest before training (SaRA, arXiv 2409.06633).

    Args:
        theta: entries with |w| < theta train. One number for all tensors.
        fraction: the share of all eligible entries, in (0, 1], that trains: theta is found from it. 1 trains all of
            them, as without the method. Neither given: 0.1.
        scope: `linears`: those of the blocks. `all`: every parameter (embeddings, norms, biases), as published.
        block: `entries`: each for itself. `rows` (output features) or `tiles` (64 x 64): whole blocks, by their root
            mean square, so that the gradient of the others is not computed.
        adjust_at: share of the run, in (0, 1), after which entries that have grown to theta are frozen as they are;
            none: never.
        keep_state: the adjustment takes the moments of what goes on along, rather than start them anew.
        lambda_rank: weight of the nuclear norm of the trained entries, as a matrix, in the loss.
        rank_mode: `random1`: of one matrix, drawn each step. `all`: of every one.
        seed: of the draws of `random1`.
    """

    about: ClassVar[str] = (
        "Trains only the entries of the weights that are smallest before training (fraction or theta; block=rows or "
        "tiles for speed): optimizer state and gradients of a tenth, no adapter, and a plain model at the end. "
        "Activations take as much memory as in full fine-tuning. Not for pretraining."
    )
    changes_outputs: ClassVar[bool] = False
    trains_own: ClassVar[bool] = True
    ops: ClassVar[tuple[str, ...]] = ("partial_weight",)

    theta: float | None = None
    fraction: float | None = None
    scope: str = "linears"
    block: str = "entries"
    adjust_at: float | None = 0.5
    keep_state: bool = False
    lambda_rank: float = 0.0
    rank_mode: str = "random1"
    seed: int = 0

    @classmethod
    def faithful(cls, theta: float = 2e-3, **changes: Any) -> Self:
        """As published: all tensors, an absolute theta, the rank term, fresh moments after half the run."""
        return cls(**{"theta": theta, "scope": "all", "lambda_rank": 5e-4, **changes})

    @classmethod
    def dense_limit(cls) -> Self:
        return cls(fraction=1.0)

    @property
    def is_dense(self) -> bool:
        """All entries train."""
        return self.fraction == 1

    @property
    def fraction_in_force(self) -> float:
        """The share that is asked for; with `theta`, what a plan without weights takes in its place."""
        return DEFAULT_FRACTION if self.fraction is None else self.fraction

    def recipe_defaults(self) -> dict[str, Any]:
        return {"lr": None, "weight_decay": DECAY}

    def adjustment_step(self, total_steps: int | None) -> int | None:
        """⌊adjust_at · total⌋: optimizer steps that are made before the adjustment."""
        return None if self.adjust_at is None or not total_steps else int(self.adjust_at * total_steps + 1e-6)

    def check(self) -> None:
        super().check()
        name = self.method
        if self.theta is not None and self.fraction is not None:
            raise ValueError(f"{name}: theta={self.theta} and fraction={self.fraction} both choose. Leave one out.")
        if self.theta is not None and not 0 < self.theta < math.inf:
            raise ValueError(f"{name}: theta={self.theta} is out of range. It must be above 0: |w| < theta trains.")
        if self.fraction is not None:
            in_range(name, "fraction", self.fraction, 0, 1, low_open=True)
        one_of(name, "scope", self.scope, SCOPES)
        one_of(name, "block", self.block, BLOCKS)
        one_of(name, "rank_mode", self.rank_mode, RANK_MODES)
        if self.adjust_at is not None and not 0 < self.adjust_at < 1:
            raise ValueError(
                f"{name}: adjust_at={self.adjust_at} is out of range. It is a share of the run, in (0, 1), or none."
            )
        in_range(name, "lambda_rank", self.lambda_rank, 0, 1e6)
        if self.block != "entries" and (self.lambda_rank or self.scope == "all"):
            given = f"lambda_rank={self.lambda_rank}" if self.lambda_rank else "scope='all'"
            raise ValueError(f"{name}: block={self.block!r} with {given}. That is for block='entries'. Leave one out.")


FURTHEST = 2e-3
"""The largest θ of the paper, whose weights are a Stable Diffusion's: at 10 % of SmolLM2-135M's, θ is 0.021."""


def learning_rate(theta: float) -> float:
    """1e-3 · exp(−350 θ): larger where smaller entries train (arXiv 2409.06633, section 4). Ours: beyond the θ that it
    was published for, its last value, 5e-4; the formula would give a language model 5e-7, which trains nothing."""
    return 1e-3 * math.exp(-350 * min(theta, FURTHEST))
