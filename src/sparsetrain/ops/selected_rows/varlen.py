"""Attention of selected rows of packed or padded samples by PyTorch's varlen attention (Flash Attention, on a GPU).

Of each document, the selected rows are its first tokens and a stretch of later ones, as in `runs`; but every document
has its own. A stretch attends to the keys from its document's first to its own last, causal to the lower right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.ops.selected_rows.keys import KeyValues, keys_with_gradient
from sparsetrain.ops.selected_rows.rows import Rows
from sparsetrain.ops.selected_rows.runs import FULL, LEAST, leading

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # it moves: it is younger than the oldest PyTorch that is supported
    varlen_attn: Any = None  # type: ignore[no-redef]

NEEDED = {"scale", "window_size", "enable_gqa"}


class Stretch(NamedTuple):
    """Queries `begin`..`end - 1` that see the keys from `start`, of all samples' tokens one after the other."""

    start: int
    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class Call:
    """One call of varlen attention. Keys that no query sees are documents without queries.

    Attributes:
        offsets_q, offsets_k: int32 [documents + 1], where each document's queries and keys begin.
        longest_q, longest_k: of a document.
    """

    offsets_q: Tensor
    offsets_k: Tensor
    longest_q: int
    longest_k: int
    num_queries: int


@dataclass(frozen=True, eq=False)
class Documents:
    """places_n: int64 [b·k], the query that each slot is, of those of all calls; behind them for unused slots.
    share: of the queries that is selected."""

    places_n: Tensor
    calls: list[Call]
    share: float

    @property
    def num_queries(self) -> int:
        return sum(call.num_queries for call in self.calls)


def attention_of_documents(
    q: Tensor, k: Tensor, v: Tensor, e: KeyValues, rows: Rows, context: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Rows that are the first tokens of documents and a stretch of later ones in each, [b, h, k, d]."""
    found = documents_of(e, rows, LEAST)
    assert found is not None
    keys, values = (_in_line(x) for x in keys_with_gradient(k, v, e, rows, context, rows.num_tokens))
    queries = q.new_zeros(found.num_queries + 1, q.shape[1], q.shape[3]).index_copy(0, found.places_n, _in_line(q))
    form = {"scale": e.scale, "window_size": (-1 if e.window is None else e.window - 1, 0)}
    form["enable_gqa"] = q.shape[1] != k.shape[1]
    out, first = [], 0
    for call in found.calls:
        some = queries[first : first + call.num_queries]
        lengths = call.offsets_q, call.offsets_k, call.longest_q, call.longest_k
        out.append(varlen_attn(some, keys, values, *lengths, **form))
        first += call.num_queries
    all_of_them = F.pad(torch.cat(out), (0, 0, 0, 0, 0, 1))
    return all_of_them.index_select(0, found.places_n).unflatten(0, rows.shape).transpose(1, 2)


def _in_line(x_bhtd: Tensor) -> Tensor:
    """[b, h, t, d] -> [b·t, h, d]."""
    return x_bhtd.transpose(1, 2).flatten(0, 1)


def no_varlen() -> str | None:
    """Why this PyTorch has no varlen attention that we can call, or None."""
    if varlen_attn is None:
        return "this PyTorch has no varlen attention"
    missing = NEEDED - signature(varlen_attn).parameters.keys()
    return f"this PyTorch's varlen attention does not know {', '.join(sorted(missing))}" if missing else None


def documents_of(e: KeyValues, rows: Rows, least: float = FULL) -> Documents | None:
    """The calls that a selection needs; None where its rows do not stand together. Read once a selection.

    Args:
        least: share of the queries that must be selected, `LEAST` or more.
    """
    segments = e.segments_bs
    known = rows.masks.get("documents")
    if known is None or known[0] is not segments:
        known = rows.masks["documents"] = segments, _documents(segments, rows)
    found = known[1]
    return found if found is not None and found.share >= least else None


def _documents(segments_bt: Tensor | None, rows: Rows) -> Documents | None:
    if segments_bt is None:
        segments_bt = torch.ones(rows.shape[0], rows.num_tokens, dtype=torch.int32, device=rows.index_bk.device)
    *first, in_one_piece = starts(segments_bt, rows.index_bk).tolist()
    if not in_one_piece:
        return None
    k, t, stretches = rows.shape[1], rows.num_tokens, []
    for sample, positions in enumerate(rows.positions):
        of_row = [(start, p) for start, p in zip(first[sample * k :], positions, strict=False)]
        if any(start < 0 for start, _ in of_row):  # padding was selected
            return None
        for start, found in groupby(of_row, key=lambda row: row[0]):
            at = sample * t
            stretches += [Stretch(*(at + x for x in s)) for s in stretches_of(start, [p for _, p in found])]
    queries = sum(s.end - s.begin for s in stretches)
    if not stretches or sum(rows.counts) < LEAST * queries:
        return None
    return laid_out(stretches, rows)


def starts(segments_bt: Tensor, index_bk: Tensor) -> Tensor:
    """int64 [b·k + 1]: where each slot's document begins, -1 in padding; and is every document in one piece?"""
    t = segments_bt.shape[1]
    place = torch.arange(t, device=segments_bt.device).expand_as(segments_bt)
    valid = segments_bt > 0
    before = F.pad(torch.where(valid, place, -1).cummax(1).values[:, :-1], (1, 0), value=-1)
    last = segments_bt.gather(1, before.clamp(min=0))
    begins = valid & ((before < 0) | (last != segments_bt))
    pieces = ~valid | begins & ((before < 0) | (last < segments_bt)) | ~begins & (before == place - 1)
    start = torch.where(begins, place, 0).cummax(1).values.masked_fill(~valid, -1)
    return torch.cat((start.gather(1, index_bk).flatten(), pieces.all()[None].long()))


def stretches_of(start: int, positions: Sequence[int]) -> list[Stretch]:
    """One or two of a document that begins at `start`; of two, the later one comes first."""
    first = leading([p - start for p in positions])
    if first in (0, len(positions)):
        return [Stretch(start, positions[0], positions[-1] + 1)]
    return [Stretch(start, positions[first], positions[-1] + 1), Stretch(start, start, start + first)]


def laid_out(stretches: Sequence[Stretch], rows: Rows) -> Documents:
    """Calls whose stretches share no key, and the place of every slot in their queries."""
    groups: list[list[Stretch]] = [[]]
    for stretch in stretches:
        again = groups[0] and groups[0][-1].start == stretch.start  # the document's first tokens
        if again and len(groups) == 1:
            groups.append([])
        groups[1 if again else 0].append(stretch)
    device, num_keys = rows.index_bk.device, rows.shape[0] * rows.num_tokens
    place_of: dict[int, int] = {}
    for stretch in (s for group in groups for s in group):
        for token in range(stretch.begin, stretch.end):
            place_of[token] = len(place_of)
    width, places = rows.shape[1], []
    for sample, positions in enumerate(rows.positions):
        found = [place_of[sample * rows.num_tokens + p] for p in positions]
        places += found + [len(place_of)] * (width - len(found))
    calls = [_call(group, num_keys, device) for group in groups]
    return Documents(torch.tensor(places).to(device), calls, sum(rows.counts) / len(place_of))


def _call(stretches: Sequence[Stretch], num_keys: int, device: torch.device) -> Call:
    queries, keys = [0], [0]
    for s in stretches:
        if s.start > keys[-1]:
            queries.append(queries[-1])
            keys.append(s.start)
        queries.append(queries[-1] + s.end - s.begin)
        keys.append(s.end)
    if keys[-1] < num_keys:
        queries.append(queries[-1])
        keys.append(num_keys)
    longest_q, longest_k = (max(b - a for a, b in pairwise(x)) for x in (queries, keys))
    offsets_q, offsets_k = (torch.tensor(x, dtype=torch.int32).to(device) for x in (queries, keys))
    return Call(offsets_q, offsets_k, longest_q, longest_k, queries[-1])
