"""Key selection as a scalar loop of the rules: the spec, for small inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsetrain.ops.product_quantization.reference import decode, encode

if TYPE_CHECKING:
    from sparsetrain.ops.key_selection import Visibility


def select_keys(
    q_bhtd: Tensor,
    k_bgsd: Tensor,
    codebook_gmew: Tensor,
    num_keys_bt: Tensor,
    visibility: Visibility,
    *,
    score: str,
    selection: str,
    distance: str,
    local_tokens: int,
    keep_first: bool,
) -> Tensor:
    b, h, t, _ = q_bhtd.shape
    g, s = k_bgsd.shape[1:3]
    codes_q = encode(q_bhtd, codebook_gmew, distance)
    codes_k = encode(k_bgsd, codebook_gmew, distance)
    quantised = decode(codes_k, codebook_gmew)
    spaces = codebook_gmew.shape[1]
    keys = torch.full((b, h, t, int(num_keys_bt.max())), -1, dtype=torch.int32)
    for n in range(b):
        for head in range(h):
            group = head // (h // g)
            for row in range(t):
                i = row + s - t
                seen = [j for j in range(s) if _visible(visibility, n, i, j)]
                limit = int(num_keys_bt[n, row])
                if score == "table":
                    points = {j: float(q_bhtd[n, head, row].float() @ quantised[n, group, j].float()) for j in seen}
                else:
                    points = {j: int((codes_q[n, head, row] == codes_k[n, group, j]).sum()) for j in seen}
                if selection == "bucket4":
                    chosen = _buckets(points, seen, limit, spaces)
                else:
                    forced = _forced(seen, i, visibility.causal, local_tokens, keep_first)
                    order = sorted(seen, key=lambda j: (j not in forced, -points[j], abs(i - j), j))
                    chosen = order[:limit]
                keys[n, head, row, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return keys


def _visible(visibility: Visibility, n: int, i: int, j: int) -> bool:
    if visibility.causal and j > i:
        return False
    if visibility.window is not None and abs(i - j) >= visibility.window:
        return False
    segments = visibility.segments_bs
    return segments is None or bool(segments[n, i] == segments[n, j] and segments[n, i] > 0)


def _forced(seen: list[int], i: int, causal: bool, local_tokens: int, keep_first: bool) -> set[int]:
    reach = local_tokens if causal else local_tokens // 2 + 1
    forced = {j for j in seen if abs(i - j) < reach or j == i} if local_tokens else set()
    return forced | set(seen[:1]) if keep_first else forced


def _buckets(points: dict[int, float], seen: list[int], limit: int, spaces: int) -> list[int]:
    chosen = []
    for residue in range(4):
        mine = seen[residue::4]
        best = sorted(mine, key=lambda j: (-min(3, points[j] // (spaces // 4)), j))
        chosen += best[: limit // 4]
    return chosen
