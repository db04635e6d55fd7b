"""Images out of a diffusion model, by DDIM (arXiv 2010.02502): deterministic once its noise is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsetrain.core.modes import evaluating
from sparsetrain.core.quote import quoted
from sparsetrain.hf.model.denoising import DiffusionModel
from sparsetrain.hf.model.diffusion_config import num_labels
from sparsetrain.planner.image_sizes import image_size
from sparsetrain.runs.sidecar import base_of

STEPS = 50
BATCH = 64


def sample(
    model: Any,
    num: int,
    *,
    labels: Sequence[int] | None = None,
    steps: int = STEPS,
    guidance: float = 1.0,
    seed: int = 0,
    progress: Callable[[float], None] = lambda _share: None,
) -> np.ndarray:
    """Draw images.

    Args:
        model: a `DiffusionModel`, or PEFT around one. num: of images.
        labels: of each image; by default each label in turn. A model without labels needs none.
        steps: forwards of the model for an image.
        guidance: 1 follows the label as it was learned; above 1, ε̂(none) + guidance · (ε̂(label) − ε̂(none))
            (arXiv 2207.12598), in twice the time.
        seed: of the noise. Image i is the same for every `num`.
        progress: called with the share done.

    Returns:
        uint8 [num, h, w, c].

    Raises:
        ValueError: the model is none of diffusion; too many steps; a label that it does not take.
    """
    inner = diffusion_model(model)
    labels_n = _labels(inner, num, labels)
    if not 1 <= steps <= inner.config.noise_steps:
        raise ValueError(f"steps={steps}: the model knows {inner.config.noise_steps} steps of noise. Give 1 to that.")
    made = []
    with evaluating(model), torch.no_grad():
        for start in range(0, num, BATCH):
            numbers = range(start, min(start + BATCH, num))
            own = None if labels_n is None else labels_n[start : start + BATCH]
            made.append(_ddim(inner, _noise(inner, numbers, seed), own, steps, guidance))
            progress(min(1.0, (start + BATCH) / num))
    return np.concatenate(made)


def diffusion_model(model: Any) -> DiffusionModel:
    """The `DiffusionModel` itself, or inside PEFT.

    Raises:
        ValueError: it is another model.
    """
    inner = base_of(model)
    if not isinstance(inner, DiffusionModel):
        raise ValueError(
            f"samples are drawn from a diffusion model, and this is a {type(inner).__name__}. Give a run of "
            "--task diffusion."
        )
    return inner


def label_of(model: Any, name: str) -> int:
    """The label that a name or a number stands for.

    Raises:
        ValueError: the model has no such label.
    """
    config = diffusion_model(model).config
    count = num_labels(config)
    names = {str(text): int(i) for i, text in (config.id2label or {}).items() if int(i) < count}
    names = names if len(names) == count else {}
    known = names | {str(i): i for i in range(count) if str(i) not in names}
    if name not in known:
        told = ", ".join(list(names)[:20]) if names else f"0 to {count - 1}" if count else "none: it takes no labels"
        raise ValueError(f"class {quoted(name)} is none of the model's. Its classes: {told}.")
    return known[name]


def _labels(model: DiffusionModel, num: int, labels: Sequence[int] | None) -> Tensor | None:
    count = num_labels(model.config)
    if not count:
        if labels is not None:
            raise ValueError("labels were given, and the model takes none. Leave them out.")
        return None
    given = [i % count for i in range(num)] if labels is None else list(labels)
    if len(given) != num or any(not 0 <= label < count for label in given):
        raise ValueError(f"{len(given)} labels up to {max(given, default=-1)} for {num} images of {count} classes.")
    return torch.tensor(given, device=model.signal_t.device)


def _noise(model: DiffusionModel, numbers: range, seed: int) -> Tensor:
    """On the CPU, so that every device begins with the same."""
    shape = (model.config.num_channels, *image_size(model.config))
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed * 2**20 + i)) for i in numbers]
    return torch.stack(drawn).to(model.signal_t.device)


def _ddim(model: DiffusionModel, noisy: Tensor, labels: Tensor | None, steps: int, guidance: float) -> np.ndarray:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    config = model.config
    scheduler: Any = DDIMScheduler(
        num_train_timesteps=config.noise_steps,
        beta_schedule=config.noise_schedule,
        prediction_type=config.prediction_type,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    kind = next(model.parameters()).dtype
    for t in scheduler.timesteps.tolist():
        t_b = torch.full((len(noisy),), t, device=noisy.device)
        found = model.denoise(noisy.to(kind), t_b, labels).float()
        if guidance != 1 and labels is not None:
            free = model.denoise(noisy.to(kind), t_b).float()
            found = free + guidance * (found - free)
        noisy = scheduler.step(found, t, noisy).prev_sample
    pixels = ((noisy.clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(0, 2, 3, 1).cpu().numpy()
