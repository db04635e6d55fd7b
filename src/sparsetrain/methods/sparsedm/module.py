"""The masked layer: a child of ours on nn.Linear, GPT-2's Conv1D or a convolution, which keeps its weight and names.

W_s = W ∘ M(W) with M of the present weights in every forward, so nothing has to be driven, packed or saved: an average
that is copied into the weights, or a checkpoint, has its own masks at once. Backward: G + λ (1 − M) ∘ W
(SparseDM, arXiv 2404.10445, section 3; SR-STE, arXiv 2102.04010).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.methods.sparsedm.config import Ratio, SparseDM
from sparsetrain.methods.sparsedm.teacher import Teacher
from sparsetrain.ops.nm_mask import masked_weight, nm_mask
from sparsetrain.surgery.reclass import dense_forward
from sparsetrain.surgery.site import Site

CHILD = "sparsedm"


class MaskedWeight(Site):
    """What stands on one layer.

    Attributes:
        keep, group: the ratio in force; both may be changed while training, as `lam` may.
        mask: bool, as the weight, once masks are frozen; else None.
        restored: made from a saved state, whose ratio holds until training says at which step it is.
        teacher: on the first site of a model that has one: see `teacher.Teacher`.
        says: on the first site, the notes on all of them.
    """

    mask: Tensor | None

    def __init__(self, layer: nn.Module, config: SparseDM, dim: int, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.config, self.dim, self.lam, self.adds_losses = config, dim, config.lam, not config.decoupled
        self.keep, self.group = config.ratio_at(0)
        self._layer: list[Any] = [layer]  # in a list, or it would be a child of its own child
        self.register_buffer("mask", None, persistent=False)
        self.restored = bool(tensors)
        self.teacher: Teacher | None = None
        self.says: list[str] = []
        if tensors:
            self._become(tensors)

    @property
    def weight(self) -> nn.Parameter:
        return self._layer[0].weight

    @property
    def ratio(self) -> Ratio:
        return Ratio(self.keep, self.group)

    @property
    def is_dense(self) -> bool:
        """Does the layer compute the very dense product now?"""
        return self.runs_dense or self.keep == self.group

    def find_mask(self) -> Tensor:
        """M of the present weights, or the frozen one."""
        return nm_mask(self.weight, self.keep, self.group, self.dim) if self.mask is None else self.mask

    def masked(self) -> Tensor:
        """W ∘ M, with λ in its backward, scaled as the loss is: passes and ranks of a step together bring it once."""
        lam = 0.0 if self.config.decoupled else self.lam
        return masked_weight(self.weight, self.find_mask(), lam, self.loss_scale.factor)

    @torch.no_grad()
    def pruned(self) -> Tensor:
        """W ∘ M with exact zeros, in the layout of the weight; W itself, copied, while all is kept."""
        weight = self.weight.detach()
        return weight.clone() if self.keep == self.group else weight.masked_fill(~self.find_mask(), 0)

    def follow(self, step: int) -> None:
        """The ratio of the plan, and the moment at which masks freeze."""
        self.keep, self.group = self.config.ratio_at(step)
        at = self.config.freeze_mask_after
        if at is None or step < at:
            self.mask = None
        elif self.mask is None and self.keep < self.group and not self.weight.is_meta:
            self.mask = self.find_mask()

    # ---- what a site is asked ----

    def settle(self) -> None:
        """For evaluation and export: the ratio that training has come to."""

    @property
    def adjusts_gradients(self) -> bool:  # type: ignore[override]
        return self.config.decoupled and self.lam > 0 and not self.is_dense and self.weight.requires_grad

    @torch.no_grad()
    def adjust_gradients(self) -> None:
        """The decoupled λ, before the optimizer's step as AdamW's own decay; gradients are left as they are."""
        self.weight.sub_(self.lam * self.weight.masked_fill(self.find_mask(), 0))

    def tensors(self) -> dict[str, Tensor]:
        found = {"ratio": torch.tensor([self.keep, self.group])}
        if self.mask is not None:
            found["mask"] = self.mask
        return found if self.teacher is None else found | {"start": self.teacher.start}

    @torch.no_grad()
    def take(self, owner: nn.Module, tensors: dict[str, Tensor]) -> None:
        start = tensors.get("start")
        if self.teacher is not None and start is not None:
            self.teacher.check_start(start)
        self._become(tensors)

    def _become(self, tensors: dict[str, Tensor]) -> None:
        mask = tensors.get("mask")
        if mask is not None and mask.shape != self.weight.shape:
            raise ValueError(f"a mask is {tuple(mask.shape)} and the weight {tuple(self.weight.shape)}")
        self.keep, self.group = tensors["ratio"].tolist()
        self.mask = None if mask is None else mask.to(self.weight.device)

    def held_models(self) -> list[nn.Module]:
        return [] if self.teacher is None or self.teacher.model is None else [self.teacher.model]

    def stats(self) -> dict[str, float]:
        return {"keep_ratio": self.keep / self.group}

    def merge_error(self) -> str | None:
        if self.keep == self.group:
            return None
        return "its weights are masked and are stored dense (to_dense writes the zeros in; so does `--format nm`)"

    def notes(self) -> list[str]:
        return self.says if self.teacher is None else self.says + self.teacher.notes(self.held_tensors())

    def _apply(self, fn: Any, recurse: bool = True) -> MaskedWeight:
        if self.teacher is not None:
            self.teacher.apply(fn)
        return super()._apply(fn, recurse)


class Masked:
    """Mixed into a linear or a convolution."""

    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        own: Any = self
        site: MaskedWeight = getattr(own, CHILD)
        if site.is_dense:
            return dense_forward(Masked, own, x)
        weight = site.masked()
        if isinstance(own, nn.modules.conv._ConvNd):
            return own._conv_forward(x, weight, own.bias)  # type: ignore[attr-defined]
        return F.linear(x, weight if site.dim == 1 else weight.t(), own.bias)
