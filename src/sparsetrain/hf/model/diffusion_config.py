"""The config of a diffusion model: the keys of the diffusers model in it, and how noise is added to images.

It is one of transformers, so that what reads, checks and writes configs here needs to know no other kind.
"""

from __future__ import annotations

from transformers import AutoConfig, PreTrainedConfig

from sparsetrain.planner.config_values import DIFFUSION


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
