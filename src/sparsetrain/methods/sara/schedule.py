"""What changes the trained entries of a whole model in training: the rank term's draw, and the adjustment."""

from __future__ import annotations

import torch
from torch import nn

from sparsetrain.methods.sara.config import FURTHEST, SaRA, learning_rate
from sparsetrain.methods.sara.module import Entries


class Schedule:
    """All it knows is in the sites' buffers, so that a run that goes on adjusts once, at its step."""

    restart_step = None

    def __init__(self, _model: nn.Module, config: SaRA, sites: list[Entries]) -> None:
        self.config, self.sites = config, sites
        if sites:
            sites[0].said = self._about()

    @property
    def _parts(self) -> list:
        return [part for site in self.sites for part in site.own_parts.values()]

    def _about(self) -> str:
        trained, total = (sum(sizes) for sizes in zip(*((p.count * p.size, p.weight.numel()) for p in self._parts)))
        theta = float(self.sites[0].theta)
        what = "entries" if self.config.block == "entries" else f"entries, in {self.config.block},"
        rate, far = learning_rate(theta), ""
        if theta > FURTHEST:
            far = f", its value at {FURTHEST:g}, the largest that it was published for"
        return (
            f"sara: {trained:,} of {total:,} {what} are below theta = {theta:.4g} and train; where no learning "
            f"rate is given, it is {rate:.3g}{far}."
        )

    def advance(self, step: int, total_steps: int | None) -> list[str]:
        """Draw the matrix of the rank term; adjust once it is time. The same step twice adjusts once."""
        self._draw(step)
        at = self.config.adjustment_step(total_steps)
        if not self.sites or at is None or step < at or int(self.sites[0].adjusted) >= 0:
            return []
        return [self._adjust(step)]

    def _draw(self, step: int) -> None:
        if not self.config.lambda_rank:
            return
        able = [(site, name) for site in self.sites for name in site.rankable()]
        if self.config.rank_mode == "random1" and able:
            draw = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
            able = [able[int(torch.randint(len(able), (), generator=draw))]]
        chosen = dict(able)
        for site in self.sites:
            site.ranked = chosen.get(site)

    def _adjust(self, step: int) -> str:
        parts, theta = self._parts, float(self.sites[0].theta)
        before = sum(part.count * part.size for part in parts)
        stays = sum(int(part.below(theta).sum()) for part in parts)
        for site in self.sites:
            site.adjusted.fill_(step)
        if not stays:
            return f"sara: after {step} steps no trained entry is below theta = {theta:.4g} any more, so all go on."
        for part in parts:
            part.keep_below(theta, keep_state=self.config.keep_state)
        after = sum(part.count * part.size for part in parts)
        moments = "with their moments" if self.config.keep_state else "with fresh moments"
        return f"sara: after {step} steps {after:,} of {before:,} entries are still below theta and go on, {moments}."
