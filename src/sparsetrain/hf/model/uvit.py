"""A U-ViT (arXiv 2209.12152), of diffusers' blocks: time, label and patches are tokens of one sequence, and a linear
joins what an early block gives to what its late counterpart reads.

diffusers has none of its own. What knows its blocks knows these; `UViT.from_pretrained` reads a saved folder.
"""

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
    """Pictures [b, in_channels, sample_size, sample_size] and timesteps [b] to noise of the same shape.

    Args:
        num_layers: blocks, an odd number: as many before the middle one as after it.
        num_class_embeds: labels, with the one that stands for none; None: it takes no labels.

    Raises:
        ValueError: an even number of blocks, or patches that do not divide a picture.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("BasicTransformerBlock",)

    @register_to_config
    def __init__(
        self,
        sample_size: int = 28,
        patch_size: int = 4,
        in_channels: int = 1,
        num_layers: int = 5,
        num_attention_heads: int = 4,
        attention_head_dim: int = 16,
        num_class_embeds: int | None = None,
    ) -> None:
        super().__init__()
        if num_layers % 2 == 0 or sample_size % patch_size:
            raise ValueError(
                f"num_layers={num_layers}, sample_size={sample_size}, patch_size={patch_size}: a U-ViT has an odd "
                "number of blocks, and patches that divide its pictures."
            )
        width, depth = num_attention_heads * attention_head_dim, num_layers // 2
        self.patch_size, self.gradient_checkpointing = patch_size, False
        self.patch_embed = PatchEmbed(sample_size, sample_size, patch_size, in_channels, width)
        self.time_proj, self.time = Timesteps(width, True, 0), TimestepEmbedding(width, width)
        self.label = nn.Embedding(num_class_embeds, width) if num_class_embeds else None
        shape = (width, num_attention_heads, attention_head_dim)
        self.blocks = nn.ModuleList(BasicTransformerBlock(*shape, activation_fn="gelu") for _ in range(num_layers))
        self.skips = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.norm, self.decode = nn.LayerNorm(width), nn.Linear(width, patch_size**2 * in_channels)
        self.final = nn.Conv2d(in_channels, in_channels, 3, padding=1)

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> Any:
        """The noise in `sample`; class_labels [b] where the model takes labels."""
        tokens = [self.time(self.time_proj(timestep).to(sample.dtype))[:, None]]
        if self.label is not None:
            assert class_labels is not None, "a model with labels is told one"
            tokens.append(self.label(class_labels)[:, None].to(sample.dtype))
        x = torch.cat([*tokens, self.patch_embed(sample)], 1)
        depth, kept = len(self.skips), []
        for i, block in enumerate(self.blocks):
            if i > depth:
                x = self.skips[i - depth - 1](torch.cat([x, kept.pop()], -1))
            recompute: Any = self._gradient_checkpointing_func if self.gradient_checkpointing else None
            x = block(x) if recompute is None or not torch.is_grad_enabled() else recompute(block, x)
            if i < depth:
                kept.append(x)
        y = self.decode(self.norm(x))[:, len(tokens) :]
        out = self.final(self._picture(y, sample))
        return UNet2DOutput(sample=out) if return_dict else (out,)

    def _picture(self, y: Tensor, sample: Tensor) -> Tensor:
        """Tokens [b, patches, patch² · channels] as a picture."""
        side, patch = sample.shape[-1] // self.patch_size, self.patch_size
        return y.view(len(y), side, side, patch, patch, -1).permute(0, 5, 1, 3, 2, 4).reshape_as(sample)
