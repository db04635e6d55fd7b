"""What a run's report shows of block patterns: each layer's mean attention, filtered map, and kept blocks."""

from __future__ import annotations

import re

from torch import Tensor

from sparsetrain.core.pictures import Gallery, Panel, Picture
from sparsetrain.surgery.method import State


def pictures(state: State) -> Gallery | None:
    """One picture a layer, from the tensors of its site; None before the first probe."""
    found = {site: tensors for site, tensors in state.items() if "mean_map" in tensors}
    order = sorted(found, key=lambda site: [int(number) for number in re.findall(r"\d+", site)])
    made = [_picture(site, found[site]) for site in order]
    return Gallery(name="patterns", heading="Attention patterns", pictures=made, item="layer") if made else None


def _picture(site: str, tensors: dict[str, Tensor]) -> Picture:
    mask, seen, switched, history = (tensors.get(name) for name in ("mask", "seen", "switched", "history"))
    density = None if mask is None or seen is None else float(mask.sum() / (len(mask) * seen.sum()))
    step = None if switched is None else int(switched[0])
    state = "dense so far" if density is None else f"{density:.1%} of the visible blocks, sparse from step {step} on"
    mean, filtered = tensors["mean_map"], tensors["filtered_map"]
    masks = [None] * len(mean) if mask is None else mask
    return Picture(
        title=f"{site}: {state}",
        panels=[_panels(*maps, len(mean), i) for i, maps in enumerate(zip(mean, filtered, masks, strict=True))],
        facts={
            "site": site,
            "blocks": mean.shape[-1],
            "density": density,
            "switched_at_step": step,
            "probes": 0 if history is None else len(history),
        },
    )


def _panels(mean_nn: Tensor, filtered_nn: Tensor, mask_nn: Tensor | None, patterns: int, i: int) -> list[Panel]:
    which = f", pattern {i}" if patterns > 1 else ""
    kept = "dense so far" if mask_nn is None else f"{int(mask_nn.sum())} of {len(mean_nn)}² blocks kept"
    shown = mean_nn * 0 if mask_nn is None else mask_nn
    return [
        Panel(name=f"mean attention{which}", values=mean_nn.float().numpy()),
        Panel(name=f"after the diagonal filter{which}", values=filtered_nn.float().numpy()),
        Panel(name=f"{kept}{which}", values=shown.numpy(), kept=True),
    ]
