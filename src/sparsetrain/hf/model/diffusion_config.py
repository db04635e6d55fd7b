"""The config of a diffusion model: the keys of the diffusers model in it, and how noise is added to images.

It is one of transformers, so that what reads, checks and writes configs here needs to know no other kind.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from sparsetrain.core.config import suggest
from sparsetrain.core.quote import quoted
from sparsetrain.planner.config_values import DIFFUSION

LABEL_KEYS = {
    "DiTTransformer2DModel": ("num_embeds_ada_norm", 0),
    "UNet2DModel": ("num_class_embeds", 1),
    "UViT": ("num_class_embeds", 1),
}
"""Class of a denoiser -> (its config's number of labels, how many of them stand for no label: a DiT adds its own)."""


class DiffusionConfig(PreTrainedConfig):
    """Keys of the diffusers model lie beside these.

    denoiser: its class. patch_size: pixels of a patch's side; 1 for a UNet, which has none.
    noise_schedule, noise_steps, prediction_type: as `beta_schedule`, `num_train_timesteps` and `prediction_type` of
        diffusers' DDPMScheduler (arXiv 2006.11239).
    label_dropout: share of training images whose label is hidden, for guidance (arXiv 2207.12598).
    """

    model_type = DIFFUSION
    attribute_map = {"image_size": "sample_size", "num_channels": "in_channels"}  # noqa: RUF012

    denoiser: str = "DiTTransformer2DModel"
    sample_size: int | list[int] = 28
    in_channels: int = 1
    patch_size: int = 1
    noise_schedule: str = "squaredcos_cap_v2"
    noise_steps: int = 1000
    prediction_type: str = "epsilon"
    label_dropout: float = 0.1


AutoConfig.register(DIFFUSION, DiffusionConfig, exist_ok=True)


def num_labels(config: Any) -> int:
    """Labels that a diffusion model takes, the one that stands for none not counted; 0: it takes none."""
    key, spare = label_key(config)
    return max(0, (getattr(config, key, None) or 0) - spare)


def set_labels(config: Any, labels: int) -> None:
    """Give a config the labels of its data, where it does not name a number.

    Raises:
        ValueError: it takes fewer.
    """
    key, spare = label_key(config)
    if getattr(config, key, None) is None:
        setattr(config, key, labels + spare)
    check_labels(config, labels)


def check_labels(config: Any, labels: int) -> None:
    """Raise ValueError if a model takes labels, and the data have more."""
    if 0 < num_labels(config) < labels:
        key, spare = label_key(config)
        raise ValueError(
            f"the data have {labels} labels, and the model takes {num_labels(config)} ({key}="
            f"{getattr(config, key)}). Use data with fewer, or a model with {key}={labels + spare}."
        )


def label_key(config: Any) -> tuple[str, int]:
    """(the config's key of its number of labels, how many of them stand for no label).

    Raises:
        ValueError: its denoiser is no class that is known here.
    """
    name = config.denoiser
    if name not in LABEL_KEYS:
        raise ValueError(
            f"denoiser={quoted(name)} is no class that can be trained here.{suggest(str(name), LABEL_KEYS)} Known: "
            f"{', '.join(LABEL_KEYS)}."
        )
    return LABEL_KEYS[name]
