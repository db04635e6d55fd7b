"""What autograd is asked: to hand an input on as an output, and whether its backward runs."""

from __future__ import annotations

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
