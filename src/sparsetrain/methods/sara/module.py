"""A module of which some entries train, and its forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.methods.sara.config import SaRA
from sparsetrain.methods.sara.part import Part
from sparsetrain.ops.partial_weight import block_linear
from sparsetrain.surgery.reclass import View, dense_forward
from sparsetrain.surgery.site import Site

SMALLEST, FEWEST = 64, 100
"""A matrix has a rank term if its smaller side is above 64 and more than 100 of its entries train."""


class Entries(Site):
    """What trains of one module, a `Part` for each of its tensors; one that is tied has the same in several modules.

    Buffers: theta (fp32 scalar), adjusted (int64 scalar: after how many steps; -1: not yet).

    Attributes:
        owned: names of the tensors that this site saves.
        ranked: name of the tensor whose nuclear norm is in this step's loss, or None. `Schedule` sets it.
        said: the line for a user, in one of all sites.
    """

    theta: Tensor
    adjusted: Tensor

    def __init__(self, config: SaRA, transposed: bool, parts: dict[str, Part], owned: tuple[str, ...]) -> None:
        super().__init__()
        self.config, self.transposed, self.owned = config, transposed, owned
        self.adds_losses = config.lambda_rank > 0
        self.ranked: str | None = None
        self.said: str | None = None
        self.last: dict[str, float] = {}
        for name, part in parts.items():
            self.add_module(name, part)
        self.register_buffer("theta", torch.zeros(()), persistent=False)
        self.register_buffer("adjusted", torch.full((), -1, dtype=torch.int64), persistent=False)

    @property
    def parts(self) -> dict[str, Part]:
        return {name: child for name, child in self.named_children() if isinstance(child, Part)}

    @property
    def own_parts(self) -> dict[str, Part]:
        return {name: part for name, part in self.parts.items() if name in self.owned}

    def run(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """The forward of `module`, with gradient to what trains."""
        if not torch.is_grad_enabled():
            return dense_forward(TrainsEntries, module, *args, **kwargs)
        out = self._used(module, *args, **kwargs)
        return self._with_rank_term(out) if self.training and self.ranked else out

    def _used(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config.block != "entries":
            return self._in_blocks(module, self.parts["weight"], *args, **kwargs)
        used = {name: part.used() for name, part in self.parts.items()}
        if _is_linear(module):  # a view would break a compiled graph
            return F.linear(*args, weight=used["weight"], bias=used.get("bias", module.bias), **kwargs)
        return dense_forward(TrainsEntries, View(module, used), *args, **kwargs)

    def _in_blocks(self, module: Any, part: Part, x: Tensor) -> Tensor:
        return block_linear(x, part.weight, part.trained(), part.places, module.bias, transposed=self.transposed)

    def _with_rank_term(self, out: Tensor) -> Tensor:
        assert self.ranked is not None
        loss = nuclear_norm(self.parts[self.ranked].as_matrix())
        self.last = {"rank_loss": loss.item()}
        return self.add_loss(out, loss, self.config.lambda_rank)

    def rankable(self) -> list[str]:
        """Names of the tensors that can have a rank term."""
        return [
            name
            for name, part in self.own_parts.items()
            if part.weight.ndim == 2 and min(part.weight.shape) > SMALLEST and part.values.numel() > FEWEST
        ]

    # ---- what a site is asked ----

    def set_step(self, step: int, total_steps: int | None) -> None:
        for part in self.own_parts.values():
            if part.values._version != part.written:  # an optimizer that torch knows nothing of
                part.write()

    def settle(self) -> None:
        for part in self.own_parts.values():
            part.sync()

    def train(self, mode: bool = True) -> Entries:
        if not mode:
            self.settle()
        super().train(mode)
        return self

    def tensors(self) -> dict[str, Tensor]:
        found = {"theta": self.theta, "adjusted": self.adjusted}
        for name, part in self.own_parts.items():
            found |= {f"{name}.{key}": tensor for key, tensor in part.tensors().items()}
        return found

    def begin(self, tensors: dict[str, Tensor]) -> None:
        """θ and what became of it, of a state."""
        for name in ("theta", "adjusted"):
            if name in tensors:
                getattr(self, name).copy_(tensors[name])

    def take(self, owner: nn.Module, tensors: dict[str, Tensor]) -> None:
        if odd := sorted(tensors.keys() ^ self.tensors().keys()):
            raise ValueError(f"it has no {odd[0]!r}, or does not know how to take it")
        self.begin(tensors)
        for name, part in self.own_parts.items():
            part.take(tensors_of(name, tensors))

    def stats(self) -> dict[str, float]:
        count = sum(part.count * part.size for part in self.own_parts.values())
        return {"trained_entries": float(count), "theta": float(self.theta), **self.last}

    def notes(self) -> list[str]:
        return [self.said] if self.said else []


def tensors_of(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state's entries of one tensor of a module."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def nuclear_norm(matrix: Tensor) -> Tensor:
    """Σ σ, in fp32 or better; its gradient is U Vᵀ, finite also where singular values are 0 or equal."""
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    with torch.autocast(wide.device.type, enabled=False):
        return torch.linalg.svdvals(wide).sum()


class TrainsEntries:
    """Mixed into a module."""

    sara: Entries

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.sara.run(self, *args, **kwargs)


def _is_linear(module: Any) -> bool:
    return (
        next(kind for kind in type(module).__mro__ if vars(kind).get("mixin") is TrainsEntries).dense_class is nn.Linear
    )
