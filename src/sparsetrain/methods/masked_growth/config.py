"""MaskedGrowth: from which sizes to which a model grows, and when."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from sparsetrain.core.config import MethodConfig, in_range, one_of, suggest
from sparsetrain.core.fields import shown

AXES = ("hidden", "ffn", "heads", "layers")
DEPTHS, REWINDS = ("stack", "interpolate"), ("none", "official", "all")
COUNTS = ("kept", "own")
SYNTAX = (
    "Write sizes as hidden=64, ffn/2 or layers*2, separated by spaces, after a share of the steps if parts are "
    "not even: 30% ffn/2 layers/2|ffn*2|40% layers*2."
)
_CHANGE = re.compile(r"([a-z_]+)([=*/])(\d{1,7})")
_SHARE = re.compile(r"(\d{1,2}(?:\.\d{1,4})?)%")
Sizes = dict[str, int]
"""Axis -> size, of all `AXES`."""


@dataclass(frozen=True)
class Change:
    """One size that a line of a plan changes: `=` to a number, `*` or `/` by one."""

    axis: str
    how: str
    number: int

    def of(self, size: int) -> int:
        """The new size.

        Raises:
            ValueError: it is not whole.
        """
        if self.how == "/" and size % self.number:
            raise ValueError(
                f"masked_growth: plan asks for {self.axis}/{self.number}, and {self.axis} is {size} there. Divide by "
                f"something that {size} is a multiple of, or give the size: {self.axis}=…"
            )
        return {"=": self.number, "*": size * self.number, "/": size // self.number}[self.how]


@dataclass(frozen=True, kw_only=True)
class MaskedGrowth(MethodConfig, method="masked_growth"):
    """Pre-train a small model first and enlarge it in mid-run, without a jump of the loss (MSG, arXiv 2305.02869).

    New units and layers begin masked: they change nothing, whatever their weights. Over a ramp their mask rises from 0
    to 1; after it the model is the plain, larger one.

    Args:
        plan: the run's parts, in order: what the first changes of the model that is asked for, then what each grows. A
            part is sizes (`hidden`, `ffn`, `heads`, `layers`) as `layers=6`, `ffn/2`, `ffn*2`, separated by spaces;
            before them, if it is not an even part, its share of the steps: `25% layers*2`. The last part must reach
            the sizes of the model that is asked for. The size of a head never changes: where it follows from the
            hidden size (GPT-2, BERT, ViT), hidden and heads grow together.
        ramp_ratio: share of the run's steps over which a mask rises; the ramp is part of its part of the plan.
        ramp_first: the mask rises before the first step of a ramp, not after it.
        new_layers: `stack` puts copies of the layers on top of them, `interpolate` each beside its source.
        new_entry_steps: Adam's count of steps, by which it corrects moments that begin at 0, for new entries of a
            weight: `kept` is the weight's, so that their first updates are 3 to 7 learning rates; `own` begins anew.
        rewind: the learning rate goes back to its peak as a growth begins: `none` of them, the first two (`official`:
            the rate then ends above 0), or `all`.
        faithful: as published: masks before the activation, on queries, keys and values; `stack`, `kept`, `official`.
    """

    about: ClassVar[str] = (
        "Pre-trains a small model and enlarges it in mid-run without changing what it computes (plan, ramp_ratio): "
        "early steps cost less. For long pre-training; not for fine-tuning, nor for runs of a few hundred steps."
    )
    changes_outputs: ClassVar[bool] = False
    grows: ClassVar[bool] = True
    ops: ClassVar[tuple[str, ...]] = ("masked_norm",)

    plan: tuple[str, ...] = ("ffn/2 layers/2", "ffn*2", "layers*2")
    ramp_ratio: float = 0.02
    ramp_first: bool = False
    new_layers: str = "stack"
    new_entry_steps: str = "kept"
    rewind: str = "none"
    faithful: bool = False

    @classmethod
    def dense_limit(cls) -> Self:
        """One part, which changes no size."""
        return cls(plan=("layers*1",))

    @classmethod
    def example(cls) -> Self:
        return cls(plan=("ffn/2 layers=2", "ffn*2", "layers=3"), ramp_ratio=0.1)

    @property
    def rewind_in_force(self) -> str:
        return "official" if self.faithful else self.rewind

    @property
    def depth_in_force(self) -> str:
        return "stack" if self.faithful else self.new_layers

    def parts(self) -> list[tuple[float, tuple[Change, ...]]]:
        """(share of the steps, changes) of each part of the plan.

        Raises:
            ValueError: a part that cannot be read; shares that do not add up.
        """
        found = [_part(line) for line in self.plan]
        given = [share for share, _ in found if share is not None]
        left = len(found) - len(given)
        rest = (1 - sum(given)) / left if left else 0.0
        if (left == 0 and not math.isclose(sum(given), 1.0, abs_tol=1e-6)) or (left and rest <= 0):
            also = ", and parts without a share are left" if left else ""
            raise ValueError(
                f"masked_growth: plan gives away {100 * sum(given):g}% of the steps{also}. "
                "Shares of all parts must add up to 100%, or leave something for those without."
            )
        return [(rest if share is None else share, changes) for share, changes in found]

    def sizes(self, full: Sizes) -> list[Sizes]:
        """The sizes that each part of the plan trains.

        Args:
            full: of the model that is asked for.

        Raises:
            ValueError: a part does not enlarge what it names, or the last is not the model that is asked for.
        """
        found, now = [], dict(full)
        for number, (_, changes) in enumerate(self.parts()):
            new = now | {change.axis: change.of(now[change.axis]) for change in changes}
            for change in changes:
                old, size = now[change.axis], new[change.axis]
                if number and size <= old:
                    raise ValueError(
                        f"masked_growth: plan part {number + 1} takes {change.axis} from {old} to {size}, which is no "
                        "growth. Give a larger size, or leave it out."
                    )
            now = new
            found.append(now)
        if off := {axis: size for axis, size in now.items() if size != full[axis]}:
            reached = ", ".join(f"{axis}={size}" for axis, size in off.items())
            wanted = ", ".join(f"{axis}={full[axis]}" for axis in off)
            raise ValueError(
                f"masked_growth: plan ends with {reached}, and the model that is asked for has {wanted}. Change the "
                "first part or the growths, or ask for a model of that size."
            )
        return found

    def check(self) -> None:
        super().check()
        name = self.method
        in_range(name, "ramp_ratio", self.ramp_ratio, 0, 1, low_open=True)
        one_of(name, "new_layers", self.new_layers, DEPTHS)
        one_of(name, "new_entry_steps", self.new_entry_steps, COUNTS)
        one_of(name, "rewind", self.rewind, REWINDS)
        if self.targets != ("*",) or self.layers is not None or self.from_depth:
            raise ValueError(f"{name}: targets, layers and from_depth choose sites, and a model grows as a whole. "
                             "Leave them out.")  # fmt: skip
        if not self.plan:
            raise ValueError(f"{name}: plan=() has no part. {SYNTAX}")
        parts = self.parts()
        short = min((share for share, _ in parts[1:]), default=1.0)
        if short <= self.ramp_ratio:
            raise ValueError(
                f"{name}: ramp_ratio={self.ramp_ratio:g} and a growth has {short:g} of the steps: it would begin while "
                "the one before still rises, or never end. Take a shorter ramp or fewer parts."
            )


def _part(line: str) -> tuple[float | None, tuple[Change, ...]]:
    words = line.split()
    share = _SHARE.fullmatch(words[0]) if words else None
    changes = tuple(_change(line, word) for word in (words[1:] if share else words))
    axes = [change.axis for change in changes]
    if not changes or len(set(axes)) < len(axes) or (share is not None and not float(share[1])):
        raise ValueError(f"masked_growth: plan={shown(line)}: no size, one twice, or no steps. {SYNTAX}")
    return None if share is None else float(share[1]) / 100, changes


def _change(line: str, word: str) -> Change:
    found = _CHANGE.fullmatch(word)
    if found is None or not int(found[3]):
        raise ValueError(f"masked_growth: plan={shown(line)}: {shown(word)} is no size. {SYNTAX}")
    if found[1] not in AXES:
        raise ValueError(
            f"masked_growth: plan={shown(line)}: unknown axis {found[1]!r}.{suggest(found[1], AXES)} "
            f"Axes: {', '.join(AXES)}."
        )
    return Change(found[1], found[2], int(found[3]))


@dataclass(frozen=True, kw_only=True)
class GrowthRamp(MethodConfig, method="masked_growth_ramp"):
    """What one growth's ramp installs in the enlarged model: masks, at what is new in it.

    Args:
        old: sizes before the growth, as `("hidden=64", …)`, of all axes.
        old_layers: places, in the enlarged model, of the layers that were there before.
        begin, end: shares of the run's steps between which the mask rises.
        own_steps: new entries have a count of steps of their own.
        ramp_first, faithful: as of `MaskedGrowth`.
    """

    listed: ClassVar[bool] = False
    ops: ClassVar[tuple[str, ...]] = ("masked_norm",)

    old: tuple[str, ...] = ()
    old_layers: tuple[int, ...] = ()
    begin: float = 0.0
    end: float = 1.0
    own_steps: bool = False
    ramp_first: bool = False
    faithful: bool = False

    @property
    def old_sizes(self) -> Sizes:
        return {axis: int(size) for axis, size in (entry.split("=") for entry in self.old)}

    def value(self, step: int, total_steps: int) -> float:
        """The mask's value for a training step: k / n, k steps after the ramp's first, of n.

        Args:
            step: optimizer steps done in the run; total_steps: of the whole run.
        """
        done, of = self.counted(step, total_steps)
        return done / of if of else 1.0

    def counted(self, step: int, total_steps: int) -> tuple[int, int]:
        """(k, n) of a training step: it is the k-th in which new entries have a gradient."""
        first, last = round(total_steps * self.begin), round(total_steps * self.end)
        return min(max(0, step - first + self.ramp_first), last - first), last - first

    def is_last(self, step: int, total_steps: int) -> bool:
        """Is it the ramp's last step?"""
        return step + 1 == round(total_steps * self.end)


def ramp_of(config: MaskedGrowth, **values: Any) -> GrowthRamp:
    own = config.new_entry_steps == "own" and not config.faithful
    return GrowthRamp(ramp_first=config.ramp_first, faithful=config.faithful, own_steps=own, **values)
