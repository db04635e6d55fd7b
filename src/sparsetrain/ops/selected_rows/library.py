"""Attention of selected queries by attention kernels that others keep: forward and backward are theirs.

They form dK and dV of every key, of which the selected rows are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from sparsetrain.ops.selected_rows.flex import attention_of_any
from sparsetrain.ops.selected_rows.keys import KeyValues
from sparsetrain.ops.selected_rows.rows import Rows, with_gradient


def attention_of_ends(q: Tensor, k: Tensor, v: Tensor, e: KeyValues, rows: Rows) -> Tensor:
    """Rows that are the m first and n last tokens of a causal sequence, by PyTorch's attention, [b, h, k, d].

    The first see one another and nothing else. The last are a causal attention with fewer queries than keys, whose mask
    is aligned to the lower right.
    """
    assert rows.ends is not None
    first, last = rows.ends
    form: Any = {"scale": e.scale, "enable_gqa": q.shape[1] != k.shape[1]}
    out = []
    if first:
        q_first, k_first, v_first = (x[:, :, :first] for x in (q, k, v))
        out.append(F.scaled_dot_product_attention(q_first, k_first, v_first, is_causal=True, **form))
    if last:
        keys, values = with_gradient(e.k_bgsd, k, rows), with_gradient(e.v_bgsd, v, rows)
        mask = causal_lower_right(last, rows.num_tokens)
        out.append(F.scaled_dot_product_attention(q[:, :, first:], keys, values, attn_mask=mask, **form))
    return out[0] if len(out) == 1 else torch.cat(out, 2)


LIBRARY: dict[str, Callable[[Tensor, Tensor, Tensor, KeyValues, Rows], Tensor]] = {
    "sdpa": attention_of_ends,
    "flex": attention_of_any,
}
