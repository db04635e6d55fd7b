"""What models of ours around a model of transformers share: they are made and opened as its auto classes are."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from sparsetrain.hf.model.opening import open_config


class Headed(PreTrainedModel):
    """A head of ours on a model of transformers, whose config is the inner model's own with keys for the head."""

    @classmethod
    def from_config(cls, config: Any, *, attn_implementation: str = "sdpa", dtype: torch.dtype | None = None) -> Any:
        """With random weights, as transformers' auto classes make a model."""
        config._attn_implementation = attn_implementation
        model: Any = cls(config)
        return model if dtype is None else model.to(dtype)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **options: Any) -> Any:
        """As any model of transformers; the inner model's family is read from the folder's config, and of its own
        folder or name the head is new."""
        if config is None:
            config = open_config(str(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **options)
