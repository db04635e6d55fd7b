"""What waits in the CPU's memory while a step is traced: its bytes leave the device, come back, and are counted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sparsetrain.planner.hollow import Hollow


def keep_on_host(model: nn.Module, hollow: Hollow) -> None:
    """Let what a checkpointed model keeps for its blocks wait on the host, as transformers' `offload` does it."""

    def pack(kept: Tensor) -> tuple[torch.Size, torch.dtype]:
        hollow.to_host += kept.numel() * kept.element_size()
        return kept.shape, kept.dtype

    def unpack(kept: tuple[torch.Size, torch.dtype]) -> Tensor:
        shape, dtype = kept
        back = torch.empty(shape, dtype=dtype, device="cpu")
        hollow.to_host += back.numel() * back.element_size()
        return back

    def offloaded(recompute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(pack, unpack):
            return recompute(*args, **kwargs)

    for module in model.modules():
        recompute = vars(module).get("_gradient_checkpointing_func")
        if recompute is not None:
            vars(module)["_gradient_checkpointing_func"] = partial(offloaded, recompute)
