"""When a model turns sparse: probe every layer's map, decide, cut all patterns. Driven by `handle.step`.

Everything it knows is in the buffers of the sites, so a run that is rebuilt from a checkpoint decides as it would have.
"""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core import ranks
from sparsetrain.core.modes import evaluating
from sparsetrain.methods.flood_fill_attention.config import MIN_PROBES, FloodFillAttention
from sparsetrain.methods.flood_fill_attention.module import PROBE, REASONS, FloodFillSparseAttention
from sparsetrain.ops.attention_patterns import MapSums, pooled_maps
from sparsetrain.surgery.attention import AttentionCall, watching

SETTLED, CAPPED, AT_ONCE = range(len(REASONS))


class SwitchSchedule:
    """Switches the sites of one config, all at one step.

    Raises:
        ValueError: the sites have neither a pattern nor rows to probe.
    """

    def __init__(self, model: nn.Module, config: FloodFillAttention, sites: list[FloodFillSparseAttention]) -> None:
        self.model, self.config, self.sites = model, config, sites
        self.search_s = 0.0  # what probes and cutting the patterns took in this process
        if not config.is_dense and not self.switched and not self.batches:
            raise ValueError(
                "flood_fill_attention has no rows to probe and no pattern. Pass calibration=[batches] of full length "
                "to sparsify(), or the state of an earlier conversion."
            )

    @property
    def switched(self) -> bool:
        return self.sites[0].mask is not None

    @property
    def batches(self) -> list[dict[str, Tensor]]:
        """The probe rows, which the first site keeps until the switch."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, value in self.sites[0].probe_rows.items():
            number, _, argument = name.removeprefix(PROBE).partition(".")
            found.setdefault(number, {})[argument] = value
        return list(found.values())

    @property
    def restart_step(self) -> int | None:
        """The step from which the learning-rate schedule counts anew, or None."""
        at = self.sites[0].switched
        return int(at[0]) if self.config.restart_lr and at is not None and int(at[0]) > 0 else None

    def advance(self, step: int, total_steps: int | None) -> list[str]:
        """Probe and switch if it is time; says what it did. The same step twice does nothing the second time."""
        if self.config.is_dense or self.switched or (step == 0 and total_steps is None):
            return []
        cap, every = self.config.last_dense_step(total_steps), self.config.probe_interval(total_steps)
        history = self.sites[0].history
        due = step > 0 and step % every == 0 and (history is None or int(history[-1, 0]) < step)
        if due:
            self._probe()
            changes = [site.record(step) for site in self.sites]
            assert self.sites[0].history is not None
            probes = len(self.sites[0].history)
            # floor(c) < threshold is the published comparison; NaN (no change known yet) and infinity fail it
            settled = all(math.isfinite(c) and math.floor(c) < self.config.change_threshold for c in changes)
            if probes >= MIN_PROBES and settled:
                return self._switch(step, SETTLED)
        if cap is None or step < cap:
            return []
        if not due:
            self._probe()
        if self.config.change_threshold > 0:
            warnings.warn(
                f"flood_fill_attention: the maps had not settled by step {step}, the end of the dense phase "
                "(max_dense_steps, max_dense_ratio); the patterns are cut now.",
                stacklevel=3,
            )
        return self._switch(step, CAPPED)

    def _probe(self) -> None:
        began = time.perf_counter()
        for site, sums in probe(self.model, self.config, [s.site.name for s in self.sites], self.batches).items():
            next(s for s in self.sites if s.site.name == site).observe(sums)
        self.search_s += time.perf_counter() - began

    def _switch(self, step: int, reason: int) -> list[str]:
        began = time.perf_counter()
        for site in self.sites:
            site.switch(step, reason)
            _share(site)
        self.search_s += time.perf_counter() - began
        densities = [site.stats()["density"] for site in self.sites]
        return [
            f"flood_fill_attention: {len(self.sites)} layers are sparse from step {step} on ({REASONS[reason]}); they "
            f"keep {sum(densities) / len(densities):.1%} of the blocks ({min(densities):.1%} to {max(densities):.1%}). "
            f"Searching the patterns took {self.search_s:.2f} s."
        ]


def probe(
    model: nn.Module,
    config: FloodFillAttention,
    sites: list[str],
    batches: list[dict[str, Tensor]],
    progress: Callable[[str, float], None] = lambda *_: None,
) -> dict[str, MapSums]:
    """Every site's pooled attention map over the batches, by an extra forward without gradient or dropout.

    Raises:
        ValueError: a site's attention function was not called, or its map holds NaN.
    """
    watches = {name: _Watch(config) for name in sites}
    body: Any = getattr(model, "base_model", model)  # the head's logits of long rows would be gigabytes
    device = next(model.parameters()).device
    options = {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}
    with torch.no_grad(), evaluating(model), watching(model, watches):
        for i, batch in enumerate(batches):
            progress("flood_fill_attention: reading attention maps", i / len(batches))
            body(**{name: value.to(device) for name, value in batch.items()}, **options)
    found = {}
    for name, watch in watches.items():
        if watch.sums is None:
            raise ValueError(
                f"flood_fill_attention cannot probe {name}: the model's forward never called its attention function on "
                "the probe rows. Leave it out with `targets` or `layers`."
            )
        found[name] = _reduced(watch.sums)
        if not bool(found[name].filtered_pnn.isfinite().all()):
            raise ValueError(
                f"flood_fill_attention: the attention map of {name} holds NaN or infinity; it has diverged."
            )
    return found


class _Watch:
    """Answers for a site's attention during a probe: adds up its maps, and runs dense."""

    def __init__(self, config: FloodFillAttention) -> None:
        self.config = config
        self.sums: MapSums | None = None

    def __call__(self, call: AttentionCall) -> Tensor:
        config = self.config
        found = pooled_maps(
            call.q,
            call.k,
            block=config.block_tokens,
            filter_edge=config.edge_in_force,
            causal=call.causal,
            scale=call.scale,
            window=call.window,
            segments_bt=call.segments,
            share_heads=config.share_heads,
            row_normalise=config.row_normalise,
        )
        self.sums = found if self.sums is None else self.sums + found
        return call.dense()


def _reduced(sums: MapSums) -> MapSums:
    """The sums over all data-parallel ranks."""
    for x in (sums.raw_pnn, sums.filtered_pnn, sums.pairs_nn):
        ranks.all_reduce_(x)
    return sums


def _share(site: FloodFillSparseAttention) -> None:
    """Rank 0's pattern for all ranks: quantiles of equal sums need not be equal to the bit on unequal devices."""
    if ranks.size() > 1:
        assert site.mask is not None
        site.mask = ranks.broadcast_(site.mask.byte()).bool()
