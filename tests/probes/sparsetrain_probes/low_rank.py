"""A linear whose weight is replaced: two factors stand for it, and the dense weight is in the model no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.core.anatomy import Anatomy, LinearSite, submodule
from sparsetrain.core.config import MethodConfig
from sparsetrain.core.cost import Cost
from sparsetrain.surgery.edits import edits_at, nothing_to_do
from sparsetrain.surgery.method import Method, register_method
from sparsetrain.surgery.site import Site


@dataclass(frozen=True, kw_only=True)
class ToyLowRank(MethodConfig, method="toy_low_rank"):
    """Replace every FFN's first linear by its best approximation of rank `rank`; 0: leave it."""

    rank: int = 8

    @classmethod
    def dense_limit(cls) -> Self:
        return cls(rank=0)


class LowRank(Site):
    """y = (x aᵀ) bᵀ + bias; a [r, in], b [out, r]."""

    def __init__(self, dense: Any, site: LinearSite, rank: int, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        weight = dense.weight.detach().t() if site.transposed else dense.weight.detach()
        u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
        self.transposed, self.bias = site.transposed, dense.bias
        self.a = nn.Parameter(tensors.get("a", s[:rank, None] * v[:rank]).clone())
        self.b = nn.Parameter(tensors.get("b", u[:, :rank]).clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a), self.b, self.bias)

    def tensors(self) -> dict[str, Tensor]:
        return {"a": self.a.detach(), "b": self.b.detach()}

    def dense_weights(self) -> dict[str, Tensor]:
        weight = (self.b @ self.a).detach()
        bias = {} if self.bias is None else {"bias": self.bias.detach()}
        return {"weight": weight.t().contiguous() if self.transposed else weight, **bias}

    def merge_error(self) -> str:
        return "its dense weights were replaced by factors"


def install(model: nn.Module, tensors: dict[str, Tensor], config: ToyLowRank, site: LinearSite) -> Any:
    parent, child = submodule(model, site.name.rpartition(".")[0]), site.name.rpartition(".")[2]
    dense = submodule(model, site.name)
    if config.rank == 0:
        return nothing_to_do()
    made = LowRank(dense, site, config.rank, tensors).train(dense.training)
    setattr(parent, child, made)
    return lambda: setattr(parent, child, dense), made


def edits(config: ToyLowRank, anatomy: Anatomy, model: nn.Module) -> list[Any]:
    def cost(site: LinearSite, _tokens: int) -> tuple[Cost, Cost]:
        before, after = site.in_features * site.out_features, config.rank * (site.in_features + site.out_features)
        return tuple(Cost(num_params=n, flops=2.0 * n) for n in (before, after if config.rank else before))  # type: ignore[return-value]

    ups = [site for site in anatomy.linears if site.role == "up"]
    gone = lambda site: (f"{site.name}.weight",) if config.rank else ()  # noqa: E731
    return edits_at(config, anatomy, ups, install, cost=cost, replaces=gone)


names = lambda anatomy: [site.name for site in anatomy.linears if site.role == "up"]  # noqa: E731
register_method(ToyLowRank, Method(edits=edits, site_names=names))
