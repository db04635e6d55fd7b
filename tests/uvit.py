"""A tiny U-ViT of diffusers' blocks: all tokens in one sequence, and long skips that are joined by a linear."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import PatchEmbed, TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn


class UViT(ModelMixin, ConfigMixin):
    """Pictures [b, channels, size, size] and timesteps [b] to noise of the same shape (arXiv 2209.12152)."""

    @register_to_config
    def __init__(self, size: int = 8, patch: int = 2, channels: int = 1, width: int = 16, depth: int = 1) -> None:
        super().__init__()
        self.patch = patch
        self.patch_embed = PatchEmbed(size, size, patch, channels, width)
        self.time_proj, self.time = Timesteps(width, True, 0), TimestepEmbedding(width, width)
        blocks = [BasicTransformerBlock(width, 2, width // 2, activation_fn="gelu") for _ in range(2 * depth + 1)]
        self.blocks = nn.ModuleList(blocks)
        self.skips = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.norm, self.decode = nn.LayerNorm(width), nn.Linear(width, patch * patch * channels)
        self.final = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> Any:
        time = self.time(self.time_proj(timestep).to(sample.dtype))
        x = torch.cat([time[:, None], self.patch_embed(sample)], 1)
        depth, kept = len(self.skips), []
        for i, block in enumerate(self.blocks):
            if i > depth:
                x = self.skips[i - depth - 1](torch.cat([x, kept.pop()], -1))
            x = block(x)
            if i < depth:
                kept.append(x)
        y = self.decode(self.norm(x))[:, 1:]
        side, patch = sample.shape[-1] // self.patch, self.patch
        y = y.view(len(y), side, side, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        out = self.final(y.reshape_as(sample))
        return UNet2DOutput(sample=out) if return_dict else (out,)
