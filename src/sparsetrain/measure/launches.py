"""What a step asks of a device, counted on any machine: launches, and reads for which the host waits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2"}
"""Operations for which a GPU's host waits."""
_VIEWS = {"aten::detach", "aten::_unsafe_view", "aten::alias"}


class CountLaunches(TorchDispatchMode):
    """Counts, inside a `with` block, the operations that PyTorch dispatches, forward and backward.

    Attributes:
        launches: operations that are no views; a GPU runs each in one kernel or more.
        reads: name -> operations that read a value, or a number of values, from the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.reads = 0, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.launches += not (func.is_view or name in _VIEWS)
        booleans = name in ("aten::index", "aten::_index_put_impl_") and any(
            isinstance(x, Tensor) and x.dtype == torch.bool for x in args[1]
        )
        if name in READS or booleans:
            self.reads[name] += 1
        return func(*args, **(kwargs or {}))
