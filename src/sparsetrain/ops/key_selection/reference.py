"""Key selection as a scalar loop of the rules: the spec, for small inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparsetrain.ops.key_selection.keys import Compared, Rule
    from sparsetrain.ops.key_selection.visibility import Sequences, Visibility


def select_keys(compared: Compared, num_keys_bt: Tensor, rule: Rule, seq: Sequences) -> Tensor:
    """keys_bhtl, one query after the other; arguments as `keys.select`."""
    q_bhtx, k_bgsx, num_levels, codebook = compared
    b, h, t, x = q_bhtx.shape
    g, s = k_bgsx.shape[1:3]
    keys = torch.full((b, h, t, min(s, int(num_keys_bt.max()))), -1, dtype=torch.int32, device=q_bhtx.device)
    for row, head, query in (
        torch.cartesian_prod(torch.arange(b), torch.arange(h), torch.arange(t)).view(-1, 3).tolist()
    ):
        i, limit = query + s - t, int(num_keys_bt[row, query])
        seen = [j for j in range(s) if _visible(rule.visibility, seq.segment_bs[row].tolist(), i, j)]
        q, k = q_bhtx[row, head, query], k_bgsx[row, head // (h // g)]
        if codebook is not None:
            points = _by_table(q, k.tolist(), codebook[head // (h // g) % len(codebook)])
        else:
            points = ((k == q).sum(-1) if num_levels is not None else (k.double() @ q.double()).float()).tolist()
        forced = _forced(rule, seen, i, int(seq.first_bs[row, i]))
        if rule.selection == "bucket4":
            quota = -(-limit // 4) if limit >= len(seen) else limit // 4
            chosen = []
            for residue in range(4):
                bucket = {j: 4 if j in forced else min(3, points[j] // (x // 4)) for j in seen[residue::4]}
                chosen += sorted(bucket, key=lambda j: (-bucket[j], j))[:quota]
        else:
            score = {j: float("inf") if j in forced else points[j] for j in seen}
            chosen = sorted(seen, key=lambda j: (-score[j], abs(i - j), j))[:limit]
        keys[row, head, query, : len(chosen)] = torch.tensor(sorted(chosen), dtype=torch.int32)
    return keys


def _by_table(q_d: Tensor, codes_nm: list[list[int]], codebook_mew: Tensor) -> list[float]:
    """sum_m <q_m, C[m, code[m]]> of every key; both sums from left to right, in fp32 (fp64 for fp64)."""
    work = torch.promote_types(q_d.dtype, torch.float32)
    terms_mew = q_d.to(work).view(len(codebook_mew), 1, -1) * codebook_mew.to(work)
    table_me = sum(terms_mew.unbind(-1), torch.zeros((), dtype=work))
    return [float(sum((t[c] for t, c in zip(table_me, codes)), torch.zeros((), dtype=work))) for codes in codes_nm]


def _visible(visibility: Visibility, segments: list[int], i: int, j: int) -> bool:
    if visibility.causal and j > i:
        return False
    if visibility.window is not None and abs(i - j) >= visibility.window:
        return False
    return segments[i] == segments[j] and segments[i] > 0


def _forced(rule: Rule, seen: list[int], i: int, first: int) -> set[int]:
    reach = rule.local_tokens if rule.visibility.causal else rule.local_tokens // 2 + 1
    forced = {j for j in seen if abs(i - j) < reach} if rule.local_tokens else set()
    return forced | {first} if rule.keep_first else forced
