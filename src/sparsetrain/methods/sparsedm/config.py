"""SparseDM: what N:M training of a diffusion model is asked to do."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

from sparsetrain.core.config import MethodConfig, in_range, one_of
from sparsetrain.core.fields import shown

DTYPES = ("same", "bf16", "fp16", "fp32")
_NUMBERS = re.compile(r"\d+(:\d+)*")


class Ratio(NamedTuple):
    """The `keep` largest of every `group` consecutive inputs are kept: N:M."""

    keep: int
    group: int

    @property
    def is_dense(self) -> bool:
        return self.keep == self.group

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"


@dataclass(frozen=True, kw_only=True)
class SparseDM(MethodConfig, method="sparsedm"):
    """Train linears and convolutions whose weights are N:M sparse in every forward (SparseDM, arXiv 2404.10445).

    The defaults are those of the published code: 2:4 from the first step, λ = 2e-4 through the optimizer, the dense
    start as teacher with a weight of 0.1.

    Args:
        pattern: N:M, at the end: of every M consecutive inputs (input channels of a convolution, of each of its groups)
            the N largest weights are kept, by magnitude, chosen anew in every forward. N = M is the dense model.
        plan: ratios on the way there, `STEP:N:M` each: from that optimizer step on. Before the first the model is
            dense; the last is `pattern`. Empty: `pattern` from the start.
        lam: λ of SR-STE: the gradient of a weight is G + λ (1 − M) ∘ W. 0 is the plain straight-through estimator.
        decoupled: λ changes weights instead, W ← W − λ (1 − M) ∘ W before each optimizer step, past Adam's moments.
        teacher_weight: of the mean squared difference to the outputs of the model as training started, added to the
            task's loss. None: 0.1 for a model that gives predictions and leaves the loss to its user (diffusion
            models), 0 for one that takes labels.
        teacher_dtype: what the teacher computes in: `same` as the model's weights, or `bf16`, `fp16`, `fp32`.
        freeze_mask_after: optimizer steps after which masks stay as they are. None: never.
    """

    about: ClassVar[str] = (
        "Trains linears and convolutions of a trained diffusion model on with N of every M weights kept (pattern; "
        "plan, lam, teacher_weight). For half of their multiplications at the end, on a GPU with 2:4 products and wide "
        "layers; elsewhere the same numbers without speed. A step costs more than a dense one, with a teacher by a "
        "forward more. Not for training from random weights: give teacher_weight=0 there."
    )
    ops: ClassVar[tuple[str, ...]] = ("nm_mask",)
    stays_sparse: ClassVar[bool] = True

    pattern: str = "2:4"
    plan: tuple[str, ...] = ()
    lam: float = 2e-4
    decoupled: bool = False
    teacher_weight: float | None = None
    teacher_dtype: str = "same"
    freeze_mask_after: int | None = None

    @classmethod
    def stepwise(cls, changes_at: tuple[int, int, int, int] = (100_000, 200_000, 300_000, 400_000)) -> Self:
        """The published stepwise plan: 7:8, then 6:8, 5:8, 4:8 and 2:4 from these steps on."""
        ratios = ("7:8", "6:8", "5:8", "4:8", "2:4")
        return cls(plan=tuple(f"{step}:{ratio}" for step, ratio in zip((0, *changes_at), ratios, strict=True)))

    @classmethod
    def ste(cls, **changes: Any) -> Self:
        """Control: the plain straight-through estimator, without teacher."""
        return cls(**{"lam": 0.0, "teacher_weight": 0.0, **changes})

    @classmethod
    def dense_limit(cls) -> Self:
        return cls(pattern="4:4")

    def recipe_defaults(self) -> dict[str, Any]:
        return {"lora_r": 0}

    @property
    def ratio(self) -> Ratio:
        """`pattern` as numbers."""
        return Ratio(*_numbers(self.pattern))

    @property
    def stages(self) -> tuple[tuple[int, Ratio], ...]:
        """(first optimizer step, ratio) of each entry of the plan."""
        return tuple((step, Ratio(*ratio)) for step, *ratio in map(_numbers, self.plan))

    def ratio_at(self, step: int) -> Ratio:
        """The ratio in force after `step` optimizer steps."""
        if not self.plan:
            return self.ratio
        group = self.stages[0][1].group
        dense = Ratio(group, group)
        return next((ratio for first, ratio in reversed(self.stages) if step >= first), dense)

    @property
    def is_dense(self) -> bool:
        """No weight is ever masked."""
        return self.ratio.is_dense and not self.plan

    @property
    def begins_dense(self) -> bool:
        return bool(self.plan) and self.ratio_at(0).is_dense

    def sparse_at_once(self) -> Self:
        return replace(self, plan=()) if self.begins_dense else self

    def check(self) -> None:
        super().check()
        name = self.method
        _check_ratio(f"{name}: pattern={shown(self.pattern)}", _numbers(self.pattern))
        for entry in self.plan:
            numbers = _numbers(entry)
            if len(numbers) != 3:
                raise ValueError(f"{name}: plan holds {shown(entry)}. Give STEP:N:M, as 1000:6:8.")
            _check_ratio(f"{name}: plan holds {shown(entry)}", numbers[1:])
        self._check_order()
        in_range(name, "lam", self.lam, 0, 1)
        if self.teacher_weight is not None:
            in_range(name, "teacher_weight", self.teacher_weight, 0, 1e6)
        one_of(name, "teacher_dtype", self.teacher_dtype, DTYPES)
        if self.freeze_mask_after is not None and self.freeze_mask_after < 0:
            raise ValueError(f"{name}: freeze_mask_after={self.freeze_mask_after}; it must be at least 0, or none.")

    def _check_order(self) -> None:
        name, steps = self.method, [step for step, _ in self.stages]
        if steps != sorted(set(steps)):
            raise ValueError(
                f"{name}: plan changes at steps {steps}, which do not increase. Give each entry a later one."
            )
        if not steps:
            return
        if (last := self.stages[-1][1]) != self.ratio:
            raise ValueError(
                f"{name}: plan ends at {last} and pattern={self.pattern!r} is what training shall come to. Let the "
                f"plan end at {self.ratio}, or give pattern={str(last)!r}."
            )
        if self.freeze_mask_after is not None and self.freeze_mask_after < steps[-1]:
            raise ValueError(
                f"{name}: freeze_mask_after={self.freeze_mask_after} is before step {steps[-1]}, at which the plan "
                "changes masks. Freeze them at that step or later."
            )


def _numbers(text: str) -> list[int]:
    """'1000:6:8' -> [1000, 6, 8]; [] for what is no such text."""
    given = isinstance(text, str) and _NUMBERS.fullmatch(text)
    return [int(part) for part in text.split(":")] if given else []


def _check_ratio(asked: str, numbers: list[int]) -> None:
    if len(numbers) != 2:
        raise ValueError(f"{asked} is no ratio. Give N:M, as 2:4.")
    keep, group = numbers
    if group < 2:
        raise ValueError(f"{asked}: M={group}, and a group has at least 2 weights. Give M >= 2, as in 2:4.")
    if not 1 <= keep <= group:
        raise ValueError(f"{asked}: N={keep}, and of {group} weights 1 to {group} can be kept. Give 1 <= N <= M.")
