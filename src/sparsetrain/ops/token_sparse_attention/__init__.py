"""Attention over listed keys: each query reads only the key positions its own list names.

Legend: b batch, h query heads, g key/value heads (g divides h), t queries, s keys, d head width, l list slots.
"""

from __future__ import annotations

from torch import Tensor

from sparsetrain.core.backend import choose
from sparsetrain.ops.qkv import check_qkv
from sparsetrain.ops.token_sparse_attention import reference
from sparsetrain.ops.token_sparse_attention.torch import attend as tiled_attend


def token_sparse_attention(
    q_bhtd: Tensor,
    k_bgsd: Tensor,
    v_bgsd: Tensor,
    keys_bhtl: Tensor,
    *,
    scale: float | None = None,
    logit_clamp: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of every query over its listed keys: the "attend" step of SPT (arXiv 2312.10365).

    out_i = sum_{j in N(i)} P_ij v_j,  P_ij = softmax over N(i) of scale * q_i . k_j,  N(i) = the list of query i.
    dV = P^T dO;  dP = dO V^T on N(i);  dS = P * (dP - rowsum(P * dP));  dQ = scale * dS K;  dK = scale * dS^T Q.

    An empty slot has weight exactly 0; a query whose slots are all empty gives 0, with zero gradients. Lists decide
    alone: causality, padding and packing belong in the choice of keys.

    Equals:
        scores = scale * q @ k.repeat_interleave(h // g, 1).mT
        scores[~torch.zeros_like(scores, dtype=torch.bool).scatter(-1, keys, True)] = -inf
        out = softmax(scores, -1) @ v.repeat_interleave(h // g, 1)

    What we do differently: the published code counts key 0 once for every unused slot and floors rowsum(P * dP) at
    1e-9; here both are exact.

    Args:
        q_bhtd: queries [b, h, t, d].
        k_bgsd, v_bgsd: keys and values [b, g, s, d], the dtype of q.
        keys_bhtl: integers [b, h, t, l] in 0 .. s - 1, in any order, -1 for an empty slot; a key named twice counts
            once.
        scale: of the scores; d ** -0.5 if None.
        logit_clamp: clamp the scaled scores to ± this (the published code's substitute for subtracting the maximum;
            scores beyond it get no gradient). Computed in checkpointed tiles, slower.
        backend: auto | reference | torch | triton.

    Returns:
        out [b, h, t, d] in q's dtype.

    Raises:
        ValueError: shapes, dtypes or positions do not fit together; the message names them.
        Unsupported: the named backend cannot run this call.

    Cost: saved for backward are q, k, v, out, log-sum-exp and the lists, 2 bytes a slot below 65,535 keys and 4 above.
    The `torch` backend computes every pair up to the last key a tile of 128 queries keeps, so its time is that of dense
    attention whatever l is, with about 32 MiB of scratch memory and never a [t, s] tensor.
    """
    _check(q_bhtd, k_bgsd, v_bgsd, keys_bhtl)
    reason = None if q_bhtd.device.type == "cpu" else f"its tiles are for a CPU, and the tensors are on {q_bhtd.device}"
    name = choose("token_sparse_attention", backend, {"torch": reason, "reference": None})
    attend = tiled_attend if name == "torch" else reference.attend
    factor = q_bhtd.shape[3] ** -0.5 if scale is None else scale
    if logit_clamp is not None:
        return reference.attend_clamped(q_bhtd, k_bgsd, v_bgsd, keys_bhtl, factor, logit_clamp)
    return attend(q_bhtd, k_bgsd, v_bgsd, keys_bhtl, factor)


def _check(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> None:
    check_qkv(q, k, v)
    if keys.is_floating_point() or keys.shape[:-1] != q.shape[:-1]:
        raise ValueError(
            f"keys is {keys.dtype} {list(keys.shape)}; need integers [{', '.join(map(str, q.shape[:3]))}, l]."
        )
    if keys.device.type == "cpu" and keys.numel():  # on a device, reading them would make the host wait
        low, high = (int(x) for x in keys.aminmax())
        if low < -1 or high >= k.shape[2]:
            raise ValueError(f"key positions span {low} .. {high}; {k.shape[2]} keys allow -1 .. {k.shape[2] - 1}.")
