"""Dropout as GPUs have it, for a trace that runs on a CPU.

On a GPU dropout inside fused attention keeps nothing, and elsewhere one byte a number. On a CPU attention with dropout
is not fused and keeps its probabilities, and a mask has the dtype of its input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sparsetrain.core.anatomy import known_parts, submodule
from sparsetrain.recipes.run import RunRecipe


def drop_as_on_a_gpu(model: Any, recipe: RunRecipe) -> None:
    """Let the model's dropouts keep what they keep on a GPU."""
    if any(config.own_dropout for config in recipe.configs):
        return  # masks are of bytes already, and attention has no dropout
    parts = [submodule(model, site.name) for site in known_parts(model).attentions]
    parts += [module for module in model.modules() if isinstance(module, nn.Dropout)]
    # blocks and pieces of FFNs are recomputed in the backward, where a mode that the model's forward turns on is off
    recomputes = recipe.gradient_checkpointing != "none" or getattr(recipe, "tiled_mlp", 1) > 1
    for module in parts if recomputes else [model]:
        module.forward = _fusing(module.forward)


class _FusedDropout(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("dropout_p"):
            kwargs = {**kwargs, "dropout_p": 0.0}
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)


def _fusing(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def fused(*args: Any, **kwargs: Any) -> Any:
        with _FusedDropout():
            return forward(*args, **kwargs)

    return fused


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x
