"""The task `diffusion`: its rows, and the loss of held-out images under noise that is the same for every model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsetrain.hf.data import DataBundle, load_images
from sparsetrain.hf.train.tasks import RowsAsked, Scores

PASSES = 4
"""Steps of noise at which each held-out image is tried."""
_GOLDEN = (math.sqrt(5) - 1) / 2


def rows(asked: RowsAsked) -> DataBundle:
    """Images; a held-out one has its number, from which its noise is drawn."""
    found = load_images(
        asked.source,
        max_rows=asked.max_rows,
        max_eval_rows=asked.max_eval_rows,
        seed=asked.recipe.seed,
        image=asked.image,
        eval_split=asked.eval_split,
        captions=True,
        **asked.hub,
    )
    assert found.eval is not None
    return replace(found, eval=found.eval.add_column("row", list(range(len(found.eval)))))  # type: ignore[call-arg]


def scores(model: Any, batch: Mapping[str, Tensor]) -> Scores:
    """The squared error of each image at `PASSES` steps of noise, spread evenly over the schedule from image to image.

    Noise and steps follow from an image's number alone, so that two models are compared under the same.
    """
    pixels, numbers = batch["pixel_values"], batch["row"].tolist()
    steps = getattr(model, "config").noise_steps  # noqa: B009  (PEFT passes it on)
    noises = [torch.Generator().manual_seed(number) for number in numbers]
    total_b = torch.zeros(len(numbers), dtype=torch.float64)
    for i in range(PASSES):
        places = [(number * _GOLDEN + i / PASSES) % 1 for number in numbers]
        t_b = torch.tensor([min(steps - 1, int(place * steps)) for place in places], device=pixels.device)
        noise = torch.stack([torch.randn(pixels.shape[1:], generator=generator) for generator in noises])
        out = model(
            pixel_values=pixels, labels=batch.get("labels"), noise=noise.to(pixels.device, pixels.dtype), timesteps=t_b
        )
        error = (out.predicted.float() - out.target.float()).square()
        total_b += error.flatten(1).mean(1).double().cpu() / PASSES
    losses = total_b.tolist()
    return Scores(sum(losses), len(losses), {}, {"loss": losses, "count": [1.0] * len(losses)})
