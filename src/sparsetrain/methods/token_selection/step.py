"""One mean over all selected targets of an optimizer step, whose micro-batches come one after another.

loss = Σ selected losses / (N · selected / targets): sums over the micro-batches and ranks of the step, and N what the
trainer divides by, the targets that it has counted.

How many targets are selected is not known before the last micro-batch is drawn. So each one leaves loss and gradients
as if it were the last: its backward first scales the gradients that are there by the old share over the new one, and
its loss holds the correction of the losses before it. Whoever sums losses and gradients has the mean at every moment.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsetrain.core import ranks

Gradients = Callable[[], Iterable[Tensor]]


def leaves_of(x: Tensor | None) -> list[Tensor]:
    """The parameters that x was computed from (soft prompts, projectors)."""
    found: dict[int, Tensor] = {}
    todo, seen = [None if x is None else x.grad_fn], set()
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        todo += [before for before, _ in node.next_functions]
    return list(found.values())


@dataclass(frozen=True)
class Tally:
    """What micro-batches have brought: targets, selected ones (or the sum of their weights), and summed losses."""

    selected: float = 0.0
    targets: float = 0.0
    total: Tensor | float = 0.0

    @property
    def scale(self) -> float:
        """1 / share of the targets that are selected; 0 while none is."""
        return self.targets / self.selected if self.selected else 0.0

    def __add__(self, more: Tally) -> Tally:
        return Tally(self.selected + more.selected, self.targets + more.targets, self.total + more.total)


class StepMean:
    """The running mean of the optimizer step that is being accumulated."""

    def __init__(self) -> None:
        self.tally = Tally()

    def begin(self) -> None:
        """A step begins: there are no gradients of its own yet."""
        self.tally = Tally()

    def begin_if_fresh(self, gradients: Collection[Tensor]) -> None:
        """A step begins when there is no gradient."""
        if not gradients:
            self.begin()

    @torch.compiler.disable()
    def add(
        self, x: Tensor, selected: float, targets: float, gradients: Gradients, spread: Tensor | None = None
    ) -> Tensor:
        """x as its share of the step's mean.

        Args:
            x: the micro-batch's selected losses over N; a scalar, or entries that are summed later.
            selected: targets that are selected here, in this micro-batch on this rank.
            targets: all of them.
            gradients: gives those that are there.
            spread: bool, like x: the entries that carry the correction of earlier micro-batches.
        """
        if ranks.size() > 1:
            both = torch.tensor([selected, targets], dtype=torch.float64, device=x.device)
            selected, targets = ranks.all_reduce_(both).tolist()
        part = Tally(selected, targets, x.detach().sum())
        return _Add.apply(x, self, part, gradients, spread)  # type: ignore[return-value]


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: StepMean, part: Tally, gradients: Gradients, spread: Tensor | None
    ) -> Tensor:
        ctx.mean, ctx.part, ctx.gradients, ctx.scale = mean, part, gradients, None
        before, after = mean.tally, mean.tally + part
        if after.scale == before.scale:
            return x * after.scale
        correction = before.total * (after.scale - before.scale)
        if spread is None:
            return x * after.scale + correction
        return x * after.scale + spread * (correction / spread.sum().clamp(min=1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (dy,) = grads
        if ctx.scale is None:  # in a second backward of the same graph the part is in the tally already
            before = ctx.mean.tally
            ctx.mean.tally = before + ctx.part
            ctx.scale = ctx.mean.tally.scale
            if before.scale not in (0.0, ctx.scale):
                for gradient in ctx.gradients():
                    gradient.mul_(ctx.scale / before.scale)
        return dy * ctx.scale, None, None, None, None
