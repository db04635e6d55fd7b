"""Running a model for what its blocks see, and no further."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core.modes import evaluating


class _Enough(Exception):
    """The last block has run."""


@contextlib.contextmanager
def blocks_only(model: nn.Module, last: nn.Module) -> Iterator[Callable[[dict[str, Tensor]], None]]:
    """Yields a function that runs a batch through the model up to and with its block `last`: no later block, no head.

    In eval mode and without gradient. Hooks on `last` must be there before. The head alone is a fifth of a forward of
    SmolLM2-135M.
    """

    def stop(*_: Any) -> None:
        raise _Enough

    def run(batch: dict[str, Tensor]) -> None:
        with contextlib.suppress(_Enough), torch.no_grad():
            model(**batch)

    hook = last.register_forward_hook(stop)
    try:
        with evaluating(model):
            yield run
    finally:
        hook.remove()
