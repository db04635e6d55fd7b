"""Movement pruning (arXiv 2005.07683), to compare with: every weight and a score for each of them are trained.

y = x (M ∘ W)ᵀ + b with M = topk(S), straight-through, so that S accumulates −lr · ∂L/∂(M ∘ W) ∘ W. It uses the ops and
the ramp of the method it is compared with, and is registered as a method of the benchmark alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, LinearSite, submodule
from sparsetrain.core.config import MethodConfig
from sparsetrain.core.cost import Cost
from sparsetrain.methods.pst.config import PST
from sparsetrain.ops.topk_mask import count_zeros, straight_through_mask
from sparsetrain.surgery.edits import edits_at, equip, nothing_to_do
from sparsetrain.surgery.method import Edit, Method, register_method
from sparsetrain.surgery.reclass import View, dense_forward
from sparsetrain.surgery.site import Site


@dataclass(frozen=True, kw_only=True)
class MovementPruning(MethodConfig, method="bench_movement"):
    """keep_ratio: as of `PST`, along the same ramp."""

    stays_sparse: ClassVar[bool] = True
    keep_ratio: float = 0.1

    @classmethod
    def dense_limit(cls) -> Self:
        return cls(keep_ratio=1.0)


class Scored(Site):
    """A score for each entry of a linear's weight, all 0 at the start, and the number of masked entries."""

    def __init__(self, weight: Tensor, keep_ratio: float, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.ramp = PST(keep_ratio=keep_ratio)
        self.scores = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))
        self.register_buffer("zeros", torch.zeros((), dtype=torch.int64), persistent=False)
        for name, value in tensors.items():
            self.get_parameter(name).data.copy_(value) if name == "scores" else self.zeros.copy_(value)

    zeros: Tensor

    def mask(self) -> Tensor:
        return straight_through_mask(self.scores, int(self.zeros))

    def set_step(self, step: int, total_steps: int | None) -> None:
        if total_steps is not None:
            self.zeros.fill_(count_zeros(self.scores.numel(), self.ramp.keep_at(step, total_steps)))

    def settle(self) -> None:
        """The share that training has come to."""

    def tensors(self) -> dict[str, Tensor]:
        return {"scores": self.scores.detach(), "zeros": self.zeros}

    def merge_error(self) -> str:
        return "its weights are masked"


class Moved:
    """Mixed into a linear."""

    def forward(self, x: Tensor) -> Tensor:
        own: Any = self
        site: Scored = own.movement
        weight = own.weight if site.runs_dense else site.mask() * own.weight
        return dense_forward(Moved, View(own, {"weight": weight}), x)


def install(model: nn.Module, tensors: dict[str, Tensor], config: MovementPruning, site: LinearSite) -> Any:
    linear: Any = submodule(model, site.name)
    if config.keep_ratio == 1:
        return nothing_to_do()
    return equip(linear, "movement", Scored(linear.weight, config.keep_ratio, tensors), Moved)


def edits(config: MovementPruning, anatomy: Anatomy, model: nn.Module) -> list[Edit]:
    def cost(site: LinearSite, _tokens: int) -> tuple[Cost, Cost]:
        return Cost(), Cost(num_params=site.in_features * site.out_features)

    return edits_at(config, anatomy, anatomy.linears, install, cost=cost)


register_method(MovementPruning, Method(edits=edits, site_names=lambda anatomy: [s.name for s in anatomy.linears]))
