"""Convolutions whose smallest weights are left out of the forward (as in SparseDM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, ConvolutionSite, submodule
from sparsetrain.core.config import MethodConfig
from sparsetrain.surgery.edits import edits_at, equip
from sparsetrain.surgery.method import Method, register_method
from sparsetrain.surgery.reclass import View, dense_forward
from sparsetrain.surgery.site import Site


@dataclass(frozen=True, kw_only=True)
class ToyConvolutionMask(MethodConfig, method="toy_convolution_mask"):
    """Keep the largest `keep_ratio` of every convolution's weights; a straight-through gradient trains all."""

    keep_ratio: float = 0.5

    @classmethod
    def dense_limit(cls) -> Self:
        return cls(keep_ratio=1.0)


class Mask(Site):
    """mask: bool, as the weight."""

    mask: Tensor

    def __init__(self, weight: Tensor, keep_ratio: float, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        order = weight.detach().abs().flatten().argsort(stable=True)
        mask = torch.ones(weight.numel(), dtype=torch.bool)
        mask[order[: int((1 - keep_ratio) * len(order))]] = False
        self.register_buffer("mask", tensors.get("mask", mask.view_as(weight)), persistent=False)

    def tensors(self) -> dict[str, Tensor]:
        return {"mask": self.mask}

    def merge_error(self) -> str | None:
        return None if self.mask.all() else "weights are masked"


class Masked:
    """Mixed into a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        own: Any = self
        if own.toy_mask.runs_dense:
            return dense_forward(Masked, own, x)
        kept = own.weight - (own.weight * ~own.toy_mask.mask).detach()
        return dense_forward(Masked, View(own, {"weight": kept}), x)


def install(model: nn.Module, tensors: dict[str, Tensor], config: ToyConvolutionMask, site: ConvolutionSite) -> Any:
    own: Any = submodule(model, site.name)
    return equip(own, "toy_mask", Mask(own.weight, config.keep_ratio, tensors), Masked)


def edits(config: ToyConvolutionMask, anatomy: Anatomy, model: nn.Module) -> list[Any]:
    return edits_at(config, anatomy, anatomy.convolutions, install)


register_method(
    ToyConvolutionMask,
    Method(
        edits=edits,
        site_names=lambda anatomy: [site.name for site in anatomy.convolutions],
        limits={"cost": "zeros are multiplied too"},
    ),
)
