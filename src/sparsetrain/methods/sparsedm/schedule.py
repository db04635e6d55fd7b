"""Which ratio is in force at a step, and when masks freeze: a pure function of the step."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsetrain.methods.sparsedm.config import SparseDM
from sparsetrain.methods.sparsedm.module import MaskedWeight


class RatioSchedule:
    """The plan of a config's layers. Weights, optimizer state and averages are not touched: only masks differ."""

    restart_step = None

    def __init__(self, model: nn.Module, config: SparseDM, sites: list[Any]) -> None:
        self.config = config
        self.sites: list[MaskedWeight] = sites

    def advance(self, step: int, total_steps: int | None) -> list[str]:
        """Follow the plan. As a saved model is rebuilt nobody knows the step yet, and what was saved holds."""
        if not self.sites or (total_steps is None and step == 0 and self.sites[0].restored):
            return []
        ratio, frozen = self.sites[0].ratio, self.sites[0].mask is not None
        for site in self.sites:
            site.follow(step)
        lines = []
        if (now := self.sites[0].ratio) != ratio and step > 0:
            lines.append(f"sparsedm: from step {step} on {now} of the weights are kept, after {ratio}.")
        if self.sites[0].mask is not None and not frozen:
            lines.append(f"sparsedm: from step {step} on masks stay as they are.")
        return lines
