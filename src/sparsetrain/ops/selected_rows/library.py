"""Attention of selected queries by attention kernels that others keep: forward and backward are theirs.

They form dK and dV of every key that they read, of which the selected rows are kept, or all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from sparsetrain.ops.selected_rows.flex import attention_of_any
from sparsetrain.ops.selected_rows.keys import KeyValues, keys_with_gradient
from sparsetrain.ops.selected_rows.rows import Rows
from sparsetrain.ops.selected_rows.runs import collected, spread
from sparsetrain.ops.selected_rows.varlen import attention_of_documents


def attention_of_run(
    q: Tensor, k: Tensor, v: Tensor, e: KeyValues, rows: Rows, context: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Rows that are the first tokens of a causal sequence and a stretch of later ones, by PyTorch's attention.

    The first see one another and nothing else. The stretch is a causal attention with fewer queries than keys, whose
    mask is aligned to the lower right; it ends with the last row, and keys after that are not read.

    Returns: [b, h, k, d].
    """
    run = rows.loose_run
    assert run is not None
    places = None if run.exact else run.places(rows.index_bk, rows.used_bk)
    queries = q if places is None else spread(q, places, run.width)
    keys, values = keys_with_gradient(k, v, e, rows, context, run.end)
    form: Any = {"scale": e.scale, "enable_gqa": q.shape[1] != k.shape[1]}
    mask: Any = causal_lower_right(run.end - run.begin, run.end)
    found = F.scaled_dot_product_attention(queries[:, :, run.first :], keys, values, attn_mask=mask, **form)
    if run.first:
        one: Any = (x[:, :, : run.first] for x in (queries, k, v))
        found = torch.cat((F.scaled_dot_product_attention(*one, is_causal=True, **form), found), 2)
    return found if places is None else collected(found, places)


LIBRARY: dict[str, Callable[[Tensor, Tensor, Tensor, KeyValues, Rows, tuple[Tensor, Tensor] | None], Tensor]] = {
    "sdpa": attention_of_run,
    "varlen": attention_of_documents,
    "flex": attention_of_any,
}
