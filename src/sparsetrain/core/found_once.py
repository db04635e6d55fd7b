"""What follows from a tensor that all layers of a forward are given: found by the first layer, left with the tensor."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_NAME = "_sparsetrain_found"


def found_once(x: Tensor, what: Hashable, find: Callable[[], T]) -> T:
    """find(), or what it was for this tensor before; found anew once the tensor was written to, and under tracing.

    For what reads values on the host: a GPU that is asked in every layer waits for the host in every layer.

    Args:
        what: names the question, with all that the answer depends on beside the tensor.
    """
    if torch.compiler.is_compiling():
        return find()
    known: Any = getattr(x, _NAME, None)
    if known is None or known[0] != x._version:
        known = x._version, {}
        setattr(x, _NAME, known)
    if what not in known[1]:
        known[1][what] = find()
    return known[1][what]
