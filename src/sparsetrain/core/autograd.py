"""What autograd is asked: to hand an input on as an output, whether its backward runs, and to run unwatched."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor


def as_output(x: Tensor) -> Tensor:
    """An input's values as the output of a `torch.autograd.Function`; it may be changed in place afterwards.

    Compiled, an output that shares an input's memory is made from that input again, and the function's backward is
    lost without a word: so there it is a copy.
    """
    return x.clone() if torch.compiler.is_compiling() else x.detach()


def in_backward() -> bool:
    """Does autograd's backward run at this moment?"""
    return torch._C._current_graph_task_id() != -1


def unwatched(function: Any) -> Any:
    """A function that no TorchFunctionMode looks into: the modes that note a block's calls would be asked for each of
    some twenty small products a tile, 30 ms a step of 30 layers. It names the device of every tensor that it makes."""

    @wraps(function)
    def run(*args: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*args)

    return run
