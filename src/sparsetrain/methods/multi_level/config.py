"""MultiLevel: the V-cycle as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from sparsetrain.core.config import MethodConfig, in_range, one_of

SCALINGS = ("norm", "official")


@dataclass(frozen=True, kw_only=True)
class MultiLevel(MethodConfig, method="multi_level"):
    """Pre-train through smaller models: the V-cycle of arXiv 2404.07999.

    The model (level 1) trains a little, is merged into a smaller one (level 2, …), which trains, is expanded again and
    mixed with what the larger one was before; then the larger one trains to the end.

    Args:
        levels: K; 2 is one smaller model, 3 a still smaller one below it.
        width: heads, hidden features and FFN units that become one from a level to the next; 1 leaves the width. Whole
            heads are merged, with grouped keys and values whole groups of them.
        depth: layers that become one; 1 leaves the depth.
        width_scheme: which: `far` (j with j + n / width), `adjacent`, or the groups of key/value heads: `0+2|1+3`.
        depth_scheme: the same of layers.
        allow_uneven: take groups of different sizes. Expanding them in width changes the function: norms see other
            statistics.
        alpha: share of the expanded small model in M ← (1 - alpha) M + alpha D(small). At 1 nothing is mixed, and
            merged units stay equal for ever.
        start_share: share of the run's steps that each level but the last trains before it is merged; 0 (two levels
            only) merges the model as it is made.
        small_share: share of the run's steps for the levels below the first, together, after their start.
        small_lr: learning rate of these steps over the run's.
        warmup_steps: steps of each stage after a mapping in which its learning rate rises. Its optimizer is new.
        scaling: `norm` keeps the output of a tied head by the gain and bias of the norm before it. `official`: the
            embeddings are doubled and halved instead, as in the authors' code, which changes the function of models
            whose embeddings no norm follows.
    """

    about: ClassVar[str] = (
        "Pre-trains a smaller model, merged out of the large one, for a part of the run, and expands it again (levels, "
        "width, depth; alpha; start_share, small_share). For long runs from random weights; not for fine-tuning."
    )
    grows: ClassVar[bool] = True
    ops: ClassVar[tuple[str, ...]] = ("unit_groups",)

    levels: int = 2
    width: int = 2
    depth: int = 2
    width_scheme: str = "far"
    depth_scheme: str = "adjacent"
    allow_uneven: bool = False
    alpha: float = 0.5
    start_share: float = 0.05
    small_share: float = 0.45
    small_lr: float = 1.0
    warmup_steps: int = 0
    scaling: str = "norm"

    @classmethod
    def published_gpt(cls, **changes: object) -> Self:
        """The authors' GPT-2 example: half the heads and layers, (j, j + n/2) in both, 5k, 50k and 50k of 105k steps,
        the small model at four times the learning rate, alpha 0.5, scaled embeddings."""
        chosen = {"depth_scheme": "far", "start_share": 5 / 105, "small_share": 50 / 105, "small_lr": 4.0}
        return cls(**{**chosen, "scaling": "official", **changes})  # type: ignore[arg-type]

    @classmethod
    def dense_limit(cls) -> Self:
        """Levels of one size, and nothing mixed: every mapping is the identity."""
        return cls(width=1, depth=1, alpha=1.0)

    @classmethod
    def example(cls) -> Self:
        return cls(depth=3)

    @property
    def final_share(self) -> float:
        """Share of the run's steps that are left to the large model at the end."""
        return 1 - (self.levels - 1) * self.start_share - self.small_share

    def check(self) -> None:
        super().check()
        name = self.method
        if self.targets != ("*",) or self.layers is not None or self.from_depth:
            raise ValueError(f"{name}: it maps the whole model. Leave out targets, layers and from_depth.")
        if self.levels < 2:
            raise ValueError(f"{name}: levels={self.levels}; two at least, one of them smaller.")
        for key, least in (("width", 1), ("depth", 1), ("warmup_steps", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"{name}: {key}={getattr(self, key)}; it must be at least {least}.")
        one_of(name, "scaling", self.scaling, SCALINGS)
        in_range(name, "alpha", self.alpha, 0, 1)
        in_range(name, "start_share", self.start_share, 0, 1)
        in_range(name, "small_share", self.small_share, 0, 1, low_open=True)
        in_range(name, "small_lr", self.small_lr, 0, 100, low_open=True)
        if self.final_share <= 1e-9:
            raise ValueError(
                f"{name}: start_share={self.start_share} for each of {self.levels - 1} levels and small_share="
                f"{self.small_share} leave nothing of the run to the large model. Lower them."
            )
        if not self.start_share and self.levels > 2:
            raise ValueError(f"{name}: start_share=0 goes with levels=2, not {self.levels}. Give each level a start.")
        for key in ("width_scheme", "depth_scheme"):
            if self.levels > 2 and "+" in getattr(self, key):
                raise ValueError(
                    f"{name}: {key}={getattr(self, key)!r} says groups of one level, and levels={self.levels}. "
                    "Write far or adjacent."
                )
        if self.scaling == "official" and (self.width != 2 or "+" in self.width_scheme):
            raise ValueError(
                f"{name}: scaling='official' has the fixed factor 2, which fits width=2 alone. Take scaling='norm'."
            )
