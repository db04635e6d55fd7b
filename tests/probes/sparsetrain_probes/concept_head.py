"""An added head with two losses and a number for the report (as in Sparse-CBM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, Block, describe, submodule
from sparsetrain.core.config import MethodConfig
from sparsetrain.core.cost import Cost
from sparsetrain.surgery.edits import edits_at, equip
from sparsetrain.surgery.method import Method, register_method
from sparsetrain.surgery.reclass import dense_forward
from sparsetrain.surgery.site import Site

CONCEPTS = 5


@dataclass(frozen=True, kw_only=True)
class ToyConcepts(MethodConfig, method="toy_concepts"):
    """Predict concepts from the last block's states: few active at once, and no two alike. Weight 0: not at all."""

    changes_outputs: ClassVar[bool] = False
    weight: float = 10.0

    @classmethod
    def dense_limit(cls) -> Self:
        return cls(weight=0.0)


class Concepts(Site):
    adds_losses = True

    def __init__(self, config: ToyConcepts, hidden: int, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.config, self.last = config, {}
        self.weight = nn.Parameter(tensors.get("weight", torch.randn(CONCEPTS, hidden) * 0.1).clone())

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight.detach()}

    def stats(self) -> dict[str, float]:
        return dict(self.last)

    def with_losses(self, states: Tensor) -> Tensor:
        if self.config.weight == 0 or self.runs_dense or not (self.training and torch.is_grad_enabled()):
            return states
        active = torch.sigmoid(states @ self.weight.t())
        few, alike = active.mean(), (self.weight @ self.weight.t()).triu(1).square().mean()
        self.last = {"few": few.item(), "alike": alike.item(), "active_ratio": (active > 0.5).float().mean().item()}
        return self.add_loss(states, few + alike, self.config.weight)


class WithConcepts:
    """Mixed into the last block."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = dense_forward(WithConcepts, self, *args, **kwargs)
        with_losses = self.toy_concepts.with_losses  # type: ignore[attr-defined]
        return (with_losses(out[0]), *out[1:]) if isinstance(out, tuple) else with_losses(out)


def install(model: nn.Module, tensors: dict[str, Tensor], config: ToyConcepts, block: Block) -> Any:
    head = Concepts(config, describe(model).ffns[-1].hidden_size, tensors)
    return equip(submodule(model, block.name), "toy_concepts", head, WithConcepts)


def edits(config: ToyConcepts, anatomy: Anatomy, model: nn.Module) -> list[Any]:
    added = Cost(num_params=CONCEPTS * anatomy.ffns[-1].hidden_size)
    claim = lambda block: (f"concepts of {block.name}",)  # noqa: E731
    return edits_at(config, anatomy, anatomy.blocks[-1:], install, cost=lambda *_: (Cost(), added), claims=claim)


names = lambda anatomy: [anatomy.blocks[-1].name] if anatomy.ffns else []  # noqa: E731
register_method(ToyConcepts, Method(edits=edits, site_names=names, modules_to_save=("toy_concepts",)))
