"""A weight of which some entries, or some blocks, train: what they are, where they lie, and their gradient.

The weight holds the trained values already; the op is what autograd has to know: the leaf is the vector of values, and
no gradient of the weight's own size is ever stored (SaRA, arXiv 2409.06633, section 3.4).
"""

from __future__ import annotations

from torch import Tensor

from sparsetrain.ops.partial_weight.blocks import block_linear as block_linear
from sparsetrain.ops.partial_weight.blocks import blocks_of as blocks_of
from sparsetrain.ops.partial_weight.blocks import places_of_blocks as places_of_blocks
from sparsetrain.ops.partial_weight.blocks import put_blocks as put_blocks
from sparsetrain.ops.partial_weight.entries import entries_of as entries_of
from sparsetrain.ops.partial_weight.entries import put_entries as put_entries
from sparsetrain.ops.partial_weight.entries import select


def partial_weight(weight: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """W, with the gradient of its entries at `places` going to `values`: ∂L/∂values = (∂L/∂W).flat[places].

    The weight's memory is handed on, not copied, and its entries at `places` are taken to be `values` already
    (`put_entries`, after the optimizer's step). Writing them here would break autograd as soon as a weight is used
    twice before one backward.

    Equals: weight.flatten().index_put((places,), values).view_as(weight), where they are.

    Args:
        weight: any shape, contiguous, frozen.
        values: [k], in the weight's dtype or a wider one.
        places: [k], int32 or int64, without repetition.

    Raises:
        ValueError: k differs, or the weight is to be trained itself.

    Cost: the gradient of the weight is there for a moment, in the backward; k numbers are kept.
    """
    if values.shape != places.shape or values.ndim != 1:
        raise ValueError(
            f"partial_weight: values {tuple(values.shape)} at places {tuple(places.shape)}. Give one value a place."
        )
    if weight.requires_grad:
        raise ValueError(
            f"partial_weight: a weight {tuple(weight.shape)} requires a gradient of its own, which would be stored. "
            "Freeze it: its entries train as `values`."
        )
    return select(weight, values, places)
