"""Which entries train: one threshold for all tensors of a model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from sparsetrain.methods.sara.config import TILE, SaRA
from sparsetrain.ops.magnitude_threshold import magnitude_threshold
from sparsetrain.ops.partial_weight import blocks_of


def block_shape(config: SaRA, weight: Tensor, transposed: bool) -> tuple[int, int] | None:
    """A block of the weight as it is stored; None for single entries. A row is an output feature."""
    if config.block == "entries":
        return None
    if config.block == "tiles":
        return TILE, TILE
    return (weight.shape[0], 1) if transposed else (1, weight.shape[1])


class Choice:
    """What a config chooses among tensors; nothing is read before it is asked for.

    Args:
        weights: name -> tensor, tied ones once.
        transposed: names of those that are stored [in, out].
    """

    def __init__(self, config: SaRA, weights: Mapping[str, Tensor], transposed: frozenset[str]) -> None:
        self.config, self.weights = config, dict(weights)
        self.shapes = {name: block_shape(config, w, name in transposed) for name, w in weights.items()}

    @cached_property
    def theta(self) -> float:
        """Entries, or root mean squares of blocks, below it are chosen.

        Raises:
            ValueError: that would be none.
        """
        if self.config.theta is not None:
            return self.config.theta
        total = sum(w.numel() for w in self.weights.values())
        wanted = int(self.config.fraction_in_force * total)
        if self.config.block == "entries":
            return magnitude_threshold(list(self.weights.values()), wanted)
        return self._block_threshold(wanted)

    def _block_threshold(self, wanted: int) -> float:
        """The root mean square of the first block that is not among the smallest ones of `wanted` entries."""
        norms = {name: self._norms(name) for name in self.weights}
        sizes = [torch.full_like(n, self.weights[name].numel() / n.numel()) for name, n in norms.items()]
        order = torch.cat(list(norms.values())).sort(stable=True)
        taken = torch.cat(sizes).double()[order.indices].cumsum(0) <= wanted
        return float(order.values[min(int(taken.sum()), len(order.values) - 1)])

    def _norms(self, name: str) -> Tensor:
        """Root mean square of each block, in their order, on the CPU."""
        shape = self.shapes[name]
        assert shape is not None
        grid = blocks_of(self.weights[name].detach(), shape).flatten(2).flatten(0, 1)
        norms = torch.linalg.vector_norm(grid, dim=1, dtype=torch.promote_types(grid.dtype, torch.float32))
        return (norms / (shape[0] * shape[1]) ** 0.5).cpu()

    def places(self, name: str) -> Tensor:
        """int32, sorted: entries of the flat weight, or numbers of blocks."""
        weight = self.weights[name].detach()
        if self.shapes[name] is not None:
            return (self._norms(name) < self.theta).nonzero().squeeze(1).int().to(weight.device)
        return (weight.float().abs().flatten() < self.theta).nonzero().squeeze(1).int()

    def count(self, name: str) -> int:
        """Chosen entries, or blocks. On the meta device weights have no magnitudes: the asked share of each."""
        weight, shape = self.weights[name], self.shapes[name]
        if not weight.is_meta:
            return self.places(name).numel() if self.theta else 0
        blocks = weight.numel() if shape is None else weight.numel() // (shape[0] * shape[1])
        return int(self.config.fraction_in_force * blocks)

    def entries(self, name: str) -> int:
        """Chosen entries."""
        shape = self.shapes[name]
        return self.count(name) * (1 if shape is None else shape[0] * shape[1])
