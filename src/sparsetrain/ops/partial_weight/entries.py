"""Single entries: int32 places in the flat weight, gathered and written by index.

On a CPU, of 3.5 M entries with 10 % chosen: index_select takes 0.8 ms by int32 and 0.5 by int64, a boolean mask 23.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsetrain.core.autograd import as_output


def entries_of(weight: Tensor, places: Tensor) -> Tensor:
    """weight.flat[places], a copy."""
    return weight.reshape(-1).index_select(0, places)


@torch.no_grad()
def put_entries(weight: Tensor, places: Tensor, values: Tensor) -> None:
    """weight.flat[places] = values, in place, rounded to the weight's dtype."""
    weight.view(-1)[places] = values.to(weight.dtype)


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.dtype = values.dtype
        return as_output(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,), (places,) = grads, ctx.saved_tensors
        return None, entries_of(grad, places).to(ctx.dtype), None


def select(weight: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """`partial_weight`, unchecked."""
    return _Select.apply(weight, values, places)  # type: ignore[return-value]
