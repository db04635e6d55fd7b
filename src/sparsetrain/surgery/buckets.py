"""Gradient buckets that follow a method which changes what trains in mid-run."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from sparsetrain.core import ranks


class GradientBuckets:
    """Those in which DDP reduces the gradients of a model: it cuts them once, and a method may change what trains."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._around: DistributedDataParallel | None = None
        if ranks.total() > 1:

            def found(*_: Any) -> None:  # a trainer hands out the model, and not what is around it
                self._around = DistributedDataParallel._active_ddp_module
                hook.remove()

            hook = model.register_forward_pre_hook(found)

    def rebuild(self) -> None:
        """Cut them again, for parameters as they are now: as after unpickling DDP, which is what makes a reducer."""
        if self._around is not None:
            self._around.__setstate__(self._around.__getstate__())
