"""How much is masked at a step, and in which matrix."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsetrain.methods.pst.config import PST
from sparsetrain.methods.pst.module import PrunedLinear
from sparsetrain.ops.topk_mask import count_zeros, global_zeros


class PruningSchedule:
    """The cubic ramp of a config's linears: a pure function of the step; what it has come to is in their tensors."""

    restart_step = None

    def __init__(self, model: nn.Module, config: PST, sites: list[Any]) -> None:
        self.config = config
        self.sites: list[PrunedLinear] = sites

    def advance(self, step: int, total_steps: int | None) -> list[str]:
        """Allot the zeros of `step`. Without a known length the share stays, and a rebuilt model keeps its zeros."""
        if not self.sites or (total_steps is None and all(site.allotted for site in self.sites)):
            return []
        before = self.sites[0].keep_ratio
        keep = before if total_steps is None else self.config.keep_at(step, total_steps)
        for site, zeros in zip(self.sites, self._zeros(keep), strict=True):
            site.allot(keep, zeros)
        if before > keep == self.config.keep_ratio:
            return [f"pst: from step {step} on {1 - keep:.0%} of the weights are 0, to the end."]
        return []

    def _zeros(self, keep_ratio: float) -> list[list[int]]:
        """By site, for each of its parts."""
        if self.config.scope == "matrix" or keep_ratio == 1:
            return [[count_zeros(weight.numel(), keep_ratio) for weight in site.weights()] for site in self.sites]
        found = iter(global_zeros([score for site in self.sites for score in site.scores()], keep_ratio))
        return [[next(found) for _ in site.parts] for site in self.sites]
