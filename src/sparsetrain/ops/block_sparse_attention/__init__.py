"""Attention over listed key blocks: each query block reads only the key blocks its list names.

Visible: with `causal` j <= i; with `window` |i - j| < window; with `segments_bs` the same positive segment id.
Positions count from the first key, and queries sit at the end of the keys (i = s - t + row), so t < s is decoding
with a cache. The block pattern is that of SPION (arXiv 2309.12578) and of block-wise key selection.

Legend: b batch, h query heads, g key/value heads (g divides h), t queries, s keys, d head width,
i query blocks of `block_q` queries, k list slots, each the id of a block of `block_k` keys.
"""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor

from sparsetrain.core.backend import choose, no_triton
from sparsetrain.core.fastest import Timings, ranked
from sparsetrain.ops.block_sparse_attention import flex, gain, reference
from sparsetrain.ops.block_sparse_attention.cases import Case
from sparsetrain.ops.block_sparse_attention.phantom import add_phantom_zeros, pruned_keys
from sparsetrain.ops.block_sparse_attention.tiles import Geometry
from sparsetrain.ops.block_sparse_attention.torch import attend as tiled_attend
from sparsetrain.ops.qkv import check_qkv, check_segments


def _triton_attend(*arguments: Any) -> tuple[Tensor, Tensor]:
    from sparsetrain.ops.block_sparse_attention.triton import attend

    return attend(*arguments)


_RUN = {"flex": flex.attend, "triton": _triton_attend, "torch": tiled_attend, "reference": reference.attend}


@overload
def block_sparse_attention(
    q_bhtd: Tensor,
    k_bgsd: Tensor,
    v_bgsd: Tensor,
    blocks_bgik: Tensor,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float | None = None,
    segments_bs: Tensor | None = None,
    window: int | None = None,
    softmax: str = "masked",
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def block_sparse_attention(
    q_bhtd: Tensor,
    k_bgsd: Tensor,
    v_bgsd: Tensor,
    blocks_bgik: Tensor,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float | None = None,
    segments_bs: Tensor | None = None,
    window: int | None = None,
    softmax: str = "masked",
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    q_bhtd: Tensor,
    k_bgsd: Tensor,
    v_bgsd: Tensor,
    blocks_bgik: Tensor,
    *,
    block_q: int,
    block_k: int,
    causal: bool,
    scale: float | None = None,
    segments_bs: Tensor | None = None,
    window: int | None = None,
    softmax: str = "masked",
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of every query over the visible keys of its listed blocks.

    out_i = sum_{j in N(i)} exp(s_ij - lse_i) v_j,  s_ij = scale * q_i . k_j,  lse_i = log sum_{j in N(i)} exp(s_ij),
    N(i) = {j : j // block_k is listed for i // block_q, and j is visible from i}; if it is empty, out_i is exactly 0,
    lse_i = -inf and gradients are zero.

    Equals:
        scores = scale * q @ k.repeat_interleave(h // g, 1).mT
        scores[~visible] = -inf
        out = softmax(scores, -1).nan_to_num(0) @ v.repeat_interleave(h // g, 1)

    Args:
        q_bhtd: queries [b, h, t, d].
        k_bgsd, v_bgsd: keys and values [b, g, s, d], the dtype of q; lengths need not divide the blocks.
        blocks_bgik: integers [b or 1, 1 or g or h, ceil(t / block_q), k]; ids in 0 .. ceil(s / block_k) - 1 in any
            order, -1 for an empty slot, no id twice in a list. A head axis of g shares a list among the h / g query
            heads of a key/value head, h gives each query head its own, 1 shares one among all.
        block_q, block_k: queries and keys in a block.
        scale: of the scores; d ** -0.5 if None.
        causal, window, segments_bs: what is visible; segments are integers [b, s], 0 = padding (never seen, and a
            padded query gives 0).
        softmax: `masked` normalises over N(i) alone; with `phantom_zero` every visible key outside N(i) adds exp(0)
            to the denominator (and to lse), so rows sum to less than 1.
        backend: auto | reference | torch (a CPU's) | flex (a GPU's, in blocks of 128 n tokens) | triton.

    Returns:
        out [b, h, t, d] in q's dtype; with `return_lse` also lse [b, h, t] in fp32 (fp64 for fp64), differentiable.

    Raises:
        ValueError: shapes, dtypes, ids or sizes do not fit together; the message names them.
        Unsupported: the named backend cannot run this call.

    Cost: forward 4 and backward 10 multiply-adds a kept pair and channel; saved for backward are q, k, v, out, lse
    and the lists. The `torch` backend needs about 32 MiB of scratch memory and never a [t, s] tensor.
    """
    geometry = Geometry(q_bhtd.shape[2], k_bgsd.shape[2], block_q, block_k, causal, window)
    _check(q_bhtd, k_bgsd, v_bgsd, blocks_bgik, segments_bs, geometry, softmax)
    name = choose("block_sparse_attention", backend, _best_first(q_bhtd, k_bgsd, geometry, blocks_bgik.shape[-1]))
    blocks_blik = blocks_bgik.expand(len(q_bhtd), max(blocks_bgik.shape[1], k_bgsd.shape[1]), -1, -1)
    factor = q_bhtd.shape[3] ** -0.5 if scale is None else scale
    out, lse = _RUN[name](q_bhtd, k_bgsd, v_bgsd, blocks_blik, segments_bs, geometry, factor)
    if softmax == "phantom_zero":
        out, lse = add_phantom_zeros(out, lse, pruned_keys(blocks_blik, segments_bs, geometry))
    return (out, lse) if return_lse else out


def dense_is_faster(
    q_bhtd: Tensor, k_bgsd: Tensor, *, block_q: int, block_k: int, num_slots: int, causal: bool
) -> str | None:
    """Where dense attention takes less time than `num_slots` blocks a list would: what was timed; else None.

    Timed on a GPU, once a shape and machine (forward and backward on random lists, without selection);
    lengths and lists are rounded up to powers of two. On a CPU nothing is timed: None.
    """
    geometry = Geometry(q_bhtd.shape[2], k_bgsd.shape[2], block_q, block_k, causal, None)
    known = _timings(q_bhtd, k_bgsd, geometry, num_slots)
    return str(known) if known is not None and known.order[:1] == ["dense"] else None


def _best_first(q: Tensor, k: Tensor, geometry: Geometry, num_slots: int) -> dict[str, str | None]:
    """Backends as `choose` takes them: where they were timed, the fastest first, and none that broke."""
    found, known = _available(q, geometry), _timings(q, k, geometry, num_slots)
    return found if known is None else ranked(found, known)


def _timings(q: Tensor, k: Tensor, geometry: Geometry, num_slots: int) -> Timings | None:
    """Of all backends that can run such a call on its GPU; None where nothing is timed."""
    if not gain.may_time(q, k) or num_slots < 1:
        return None
    found = _available(q, geometry)
    backends = {name: _timed_by(name) for name in ("flex", "triton") if found[name] is None}
    if not backends:
        return None
    case = gain.shape_of(q, k, geometry.block_q, geometry.block_k, num_slots, geometry.causal)
    return gain.timings(case, q.dtype, q.device, backends)


def _timed_by(name: str) -> gain.Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, case: Case) -> Tensor:
        geometry = Geometry(q.shape[2], k.shape[2], case.block_q, case.block_k, case.causal, case.window)
        return _RUN[name](q, k, v, lists, None, geometry, q.shape[3] ** -0.5)[0]

    return attend


def on_device(q: Tensor) -> dict[str, str | None]:
    """Backends of an ordinary call on such queries, [b, h, t, d], in blocks of 128; best first, untimed; and why one
    cannot."""
    return _available(q, Geometry(q.shape[2], q.shape[2], 128, 128, True, None))


def _available(q: Tensor, geometry: Geometry) -> dict[str, str | None]:
    block_q, block_k = geometry.block_q, geometry.block_k
    tiled = None if q.device.type == "cpu" else f"its tiles are for a CPU, and the tensors are on {q.device}"
    kernels = no_triton(q.device)
    if kernels is None:
        from sparsetrain.ops.block_sparse_attention.triton import unable

        kernels = unable(q, block_q, block_k)
    found = {"flex": flex.unable(q, block_q, block_k), "triton": kernels, "torch": tiled, "reference": None}
    # the interpreter is for tests: it runs where it is asked for by name
    return found if q.device.type == "cuda" else dict(sorted(found.items(), key=lambda item: item[0] == "triton"))


def _check(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, segments: Tensor | None, geometry: Geometry, softmax: str
) -> None:
    check_qkv(q, k, v)
    check_segments(segments, k)
    _check_lists(q, k, blocks, geometry)
    t, s, window = geometry.num_queries, geometry.num_keys, geometry.window
    if t > s and (geometry.causal or window is not None or segments is not None):
        raise ValueError(f"{t} queries and {s} keys: causal, window and segments place queries at the end of the keys.")
    if window is not None and window < 1:
        raise ValueError(f"window={window} hides every key; give a positive window or None.")
    if softmax not in ("masked", "phantom_zero"):
        raise ValueError(f"softmax={softmax!r} is unknown. Choose 'masked' or 'phantom_zero'.")


def _check_lists(q: Tensor, k: Tensor, blocks: Tensor, geometry: Geometry) -> None:
    block_q, block_k = geometry.block_q, geometry.block_k
    if block_q < 1 or block_k < 1:
        raise ValueError(f"block_q={block_q}, block_k={block_k}: blocks hold at least one token.")
    num_query_blocks = -(-q.shape[2] // block_q)
    if blocks.ndim != 4 or blocks.is_floating_point() or blocks.shape[2] != num_query_blocks:
        raise ValueError(
            f"blocks is {blocks.dtype} {list(blocks.shape)}; {q.shape[2]} queries in blocks of {block_q} need integers "
            f"[b, heads, {num_query_blocks}, slots]."
        )
    if blocks.shape[0] not in (1, q.shape[0]) or blocks.shape[1] not in (1, k.shape[1], q.shape[1]):
        raise ValueError(
            f"blocks {list(blocks.shape)}: the first axis must be 1 or b={q.shape[0]}, "
            f"the second 1, g={k.shape[1]} or h={q.shape[1]}."
        )
    _check_ids(blocks, geometry.num_key_blocks)


def _check_ids(blocks: Tensor, num_key_blocks: int) -> None:
    """On the CPU reading the ids is free; on a device it would make the host wait, so there they are trusted."""
    if blocks.device.type != "cpu" or blocks.numel() == 0:
        return
    low, high = (int(x) for x in blocks.aminmax())
    if low < -1 or high >= num_key_blocks:
        raise ValueError(
            f"block ids span {low} .. {high}; {num_key_blocks} key blocks allow -1 .. {num_key_blocks - 1}."
        )
    ids = blocks.sort(dim=-1).values
    twice = (ids[..., 1:] == ids[..., :-1]) & (ids[..., 1:] >= 0)
    if bool(twice.any()):
        at = twice.nonzero()[0].tolist()
        raise ValueError(f"list {at[:3]} names block {int(ids[tuple(at)])} twice; name each block once.")
