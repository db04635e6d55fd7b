"""Which entries of a weight are updated: the trainable is a vector of chosen values (as in SaRA, arXiv 2409.06633)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, LinearSite, submodule
from sparsetrain.core.config import MethodConfig
from sparsetrain.core.cost import Cost
from sparsetrain.surgery.edits import edits_at, equip, nothing_to_do
from sparsetrain.surgery.method import Method, register_method
from sparsetrain.surgery.reclass import View, dense_forward
from sparsetrain.surgery.site import Site


@dataclass(frozen=True, kw_only=True)
class ToyEntries(MethodConfig, method="toy_entries"):
    """Train the smallest `ratio` of every FFN weight; the rest stays."""

    changes_outputs: ClassVar[bool] = False
    trains_own: ClassVar[bool] = True
    ratio: float = 0.25

    @classmethod
    def dense_limit(cls) -> Self:
        return cls(ratio=1.0)


class Entries(Site):
    """values [k] of the weight's entries at `places` [k] of its flat form."""

    def __init__(self, weight: Tensor, tensors: dict[str, Tensor], count: int) -> None:
        super().__init__()
        self.rest = lambda: weight.detach()
        smallest = weight.detach().abs().flatten().sort(stable=True).indices[:count].sort().values
        self.register_buffer("places", tensors.get("places", smallest), persistent=False)
        self.values = nn.Parameter(tensors.get("values", weight.detach().flatten()[self.places]).clone())

    def written(self) -> Tensor:
        return self.rest().flatten().scatter(0, self.places, self.values).view_as(self.rest())

    def tensors(self) -> dict[str, Tensor]:
        return {"places": self.places, "values": self.values.detach()}

    def dense_weights(self) -> dict[str, Tensor]:
        return {"weight": self.written().detach()}


class TrainsEntries:
    """Mixed into a linear."""

    def forward(self, x: Tensor) -> Tensor:
        linear: Any = self
        weight = linear.weight if linear.toy_entries.runs_dense else linear.toy_entries.written()
        return dense_forward(TrainsEntries, View(linear, {"weight": weight}), x)


def install(model: nn.Module, tensors: dict[str, Tensor], config: ToyEntries, site: LinearSite) -> Any:
    linear: Any = submodule(model, site.name)
    if config.ratio == 1:
        return nothing_to_do()
    trained, count = linear.weight.requires_grad, int(config.ratio * linear.weight.numel())
    undo, entries = equip(linear, "toy_entries", Entries(linear.weight, tensors, count), TrainsEntries)
    linear.weight.requires_grad_(False)
    return lambda: [undo(), linear.weight.requires_grad_(trained)], entries


def taken(anatomy: Anatomy) -> list[LinearSite]:
    return [site for site in anatomy.linears if site.role in ("up", "gate", "down")]


def edits(config: ToyEntries, anatomy: Anatomy, model: nn.Module) -> list[Any]:
    count = lambda site: int(config.ratio * site.in_features * site.out_features) * (config.ratio < 1)  # noqa: E731
    cost = lambda site, _tokens: (Cost(), Cost(num_params=count(site)))  # noqa: E731
    return edits_at(config, anatomy, taken(anatomy), install, cost=cost)


register_method(ToyEntries, Method(edits=edits, site_names=lambda anatomy: [site.name for site in taken(anatomy)]))
