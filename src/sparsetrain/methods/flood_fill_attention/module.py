"""Flood-fill attention inside a model: one layer's maps and pattern, and what runs instead of dense attention.

Nothing here changes during a forward: `schedule.py` looks at the maps and sets the pattern between two steps.

Legend: b batch, h query heads, g key/value heads, t queries, s keys, d head width, p patterns (1 or g), n blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.core.anatomy import AttentionSite
from sparsetrain.methods.flood_fill_attention.config import FloodFillAttention
from sparsetrain.ops.attention_patterns import block_lists, block_pattern, fit_pattern
from sparsetrain.ops.attention_patterns.maps import MapSums
from sparsetrain.ops.block_sparse_attention import block_sparse_attention, dense_is_faster
from sparsetrain.ops.block_sparse_attention.phantom import add_phantom_zeros
from sparsetrain.ops.block_sparse_attention.reference import masked_attention
from sparsetrain.ops.segments import align_segments, has_gaps, places_in_segments
from sparsetrain.surgery.attention import AttentionCall, SparseAttention, say_dense

STATE = ("mask", "mean_map", "filtered_map", "seen", "reference_map", "history", "switched")
"""Buffers of a site, all None at first.

mask: bool [p, n, n], the pattern. mean_map, filtered_map: [p, n, n], as last probed. seen: bool [n, n], cells with a
visible pair. reference_map: what the next probe is compared with. history: [probes, 3], step, distance and change in
percent (NaN where undefined). switched: [2], the step, and why (an index of `REASONS`).
"""
REASONS = ("the maps have settled", "the dense phase is over", "cut at the conversion")
PROBE = "probe."
"""Names of probe rows in the state: `probe.<batch>.<argument of forward>`."""


class FloodFillSparseAttention(SparseAttention):
    """What answers for a converted attention."""

    def __init__(self, config: FloodFillAttention, site: AttentionSite, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.config, self.site = config, site
        # not in the state dict: it keeps the dense names, and the sidecar carries these
        for name in STATE:
            self.register_buffer(name, tensors.get(name), persistent=False)
        self.probe_rows = {name: value for name, value in tensors.items() if name.startswith(PROBE)}
        self._lists: dict[tuple[int, torch.device], Tensor] = {}  # made once a length: on a GPU their width is a sync

    mask: Tensor | None
    mean_map: Tensor | None
    filtered_map: Tensor | None
    seen: Tensor | None
    reference_map: Tensor | None
    history: Tensor | None
    switched: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        found = {name: value for name in STATE if (value := getattr(self, name)) is not None}
        return found | (self.probe_rows if self.mask is None else {})

    def take(self, owner: nn.Module, tensors: dict[str, Tensor]) -> None:
        device = next(owner.parameters()).device
        for name in STATE:
            setattr(self, name, tensors[name].to(device) if name in tensors else None)
        self.probe_rows = {name: value for name, value in tensors.items() if name.startswith(PROBE)}
        self._lists.clear()

    def stats(self) -> dict[str, float]:
        if self.mask is None or self.seen is None or self.switched is None:
            return {"num_probes": 0.0 if self.history is None else float(len(self.history))}
        kept = self.mask.sum((1, 2)).float().mean()
        rows = self.mask.sum(-1).float()
        return {
            "density": float(kept / self.seen.sum()),
            "kept_blocks": float(kept),
            "kept_blocks_per_row_min": float(rows.min()),
            "kept_blocks_per_row_max": float(rows.max()),
            "switched_at_step": float(self.switched[0]),
        }

    def merge_error(self) -> str | None:
        if self.mask is None or self.seen is None or bool((self.mask | ~self.seen).all()):
            return None
        return f"its pattern keeps {self.stats()['density']:.1%} of the blocks, and dense attention would read all"

    def observe(self, sums: MapSums) -> None:
        """Take over the maps of a probe."""
        self.mean_map, self.filtered_map = (x.float() for x in sums.means())
        self.seen = sums.seen_nn

    def record(self, step: int) -> float:
        """Compare the filtered map with the reference, move the reference, and return the change in percent."""
        assert self.filtered_map is not None
        history = torch.empty(0, 3, dtype=torch.float64) if self.history is None else self.history.cpu()
        distance = change = torch.nan
        if self.reference_map is not None:
            distance = float((self.filtered_map - self.reference_map).double().norm())
            before = float(history[-1, 1])
            if before == 0:
                change = 0.0 if distance == 0 else torch.inf
            elif before == before:  # not NaN: the second distance or a later one
                change = 100 * abs(distance - before) / before
        device = self.filtered_map.device
        self.history = torch.cat((history, torch.tensor([[step, distance, change]], dtype=torch.float64))).to(device)
        # the official code leaves the reference where it was at the second probe
        if self.config.reference == "previous" or len(history) != 1:
            self.reference_map = self.filtered_map
        return change

    def switch(self, step: int, reason: int) -> None:
        """Cut the pattern from the maps last probed; attention is sparse from now on."""
        assert self.filtered_map is not None and self.seen is not None
        config = self.config
        try:
            mask = block_pattern(
                self.filtered_map, self.seen, variant=config.variant, causal=self.site.causal, **config.target
            )
        except ValueError as error:
            raise ValueError(f"{self.site.name}: {error}") from None
        self.mask = mask
        self._lists.clear()
        self.switched = torch.tensor([step, reason], device=mask.device)
        self.reference_map, self.probe_rows = None, {}

    def forward(self, call: AttentionCall) -> Tensor:
        """[b, h, t, d]."""
        if self.mask is None or self.runs_dense:
            return call.dense()
        if call.q.shape[2] != call.k.shape[2]:
            return self._by_mask(call)
        if self.config.softmax == "masked" and self._loses(call):
            return call.dense()
        # a window counts padding inside a sequence, which has no place in a block
        gaps = call.window is not None and call.segments is not None and has_gaps(call.segments)
        return call.with_padding(self._by_mask(call) if gaps else self._by_block(call))

    def _loses(self, call: AttentionCall) -> bool:
        """Whether dense attention was faster here when both were timed; says so once."""
        block = self.config.block_tokens
        if call.segments is not None:
            return False
        slots = self._lists_for(-(-call.q.shape[2] // block)).shape[-1]
        timed = dense_is_faster(call.q, call.k, block_q=block, block_k=block, num_slots=slots, causal=call.causal)
        if timed is not None:
            say_dense(type(self.config).__name__, timed)
        return timed is not None

    def _by_block(self, call: AttentionCall) -> Tensor:
        config, block, aligned = self.config, self.config.block_tokens, None
        if call.segments is not None and not _starts_at_blocks(call.segments, block):
            aligned = align_segments(call.segments, block)
            call = call.gathered(aligned)
        num_blocks = -(-call.q.shape[2] // block)
        longest, own_bn, first_bn = _sequence_blocks(call.segments, block, num_blocks)
        lists = self._lists_for(longest)
        if own_bn is not None and first_bn is not None:
            lists = _lists_of_sequences(lists, own_bn, first_bn)
        with self.watching():
            out = block_sparse_attention(
                call.q,
                call.k,
                call.v,
                lists,
                block_q=block,
                block_k=block,
                causal=call.causal,
                scale=call.scale,
                segments_bs=call.segments,
                window=call.window,
                softmax=config.softmax,
            )
        return out if aligned is None else aligned.scatter(out)

    def _lists_for(self, num_blocks: int) -> Tensor:
        """The pattern of a sequence of so many blocks, as lists [1, p, n, k]."""
        assert self.mask is not None
        key = (num_blocks, self.mask.device)
        if key not in self._lists:
            self._lists[key] = block_lists(fit_pattern(self.mask, num_blocks, self.config.extend))
        return self._lists[key]

    def _by_mask(self, call: AttentionCall) -> Tensor:
        """The same pattern as an explicit mask of t * s pairs, for a few queries at the end of cached keys."""
        assert self.mask is not None
        q, k, segments_bs = call.q, call.k, call.segments
        t, s = q.shape[2], k.shape[2]
        position = torch.arange(s, device=q.device)
        ids = torch.ones(1, s, dtype=torch.int32, device=q.device) if segments_bs is None else segments_bs
        place = places_in_segments(ids)[0] if call.places is None else call.places
        block = place.clamp(min=0) // self.config.block_tokens
        mask = fit_pattern(self.mask, int(block[ids > 0].max()) + 1, self.config.extend)
        distance = position[s - t :, None] - position
        visible = (ids[:, s - t :, None] == ids[:, None]) & (ids[:, s - t :, None] > 0)
        visible = visible & (distance >= 0) if call.causal else visible
        visible = visible if call.window is None else visible & (distance.abs() < call.window)
        block = block.clamp(max=mask.shape[-1] - 1)  # padding may run on; it sees and is seen by nothing
        kept = mask[:, block[:, s - t :, None], block[:, None]].movedim(0, 1) & visible[:, None]
        kept = kept.expand(len(q), -1, -1, -1)
        out, lse = masked_attention(q, k, call.v, kept, call.scale)
        if self.config.softmax == "phantom_zero":
            out, _ = add_phantom_zeros(out, lse, visible[:, None].sum(-1) - kept.sum(-1))
        return out


def _starts_at_blocks(segments_bs: Tensor, block: int) -> bool:
    """Does every sequence begin at a block boundary, without padding inside? Rows padded on the right need no move."""
    starts = places_in_segments(segments_bs)[1]
    starts[:, ::block] = False
    return not bool(starts.any()) and not has_gaps(segments_bs)


def _sequence_blocks(
    segments_bs: Tensor | None, block: int, num_blocks: int
) -> tuple[int, Tensor | None, Tensor | None]:
    """(blocks of the longest sequence, segment id of each block, first block of each block's segment), [b, n].

    Every segment starts at a block boundary; gaps have id 0.
    """
    if segments_bs is None:
        return num_blocks, None, None
    own = segments_bs[:, ::block]
    begins = F.pad(own[:, 1:] != own[:, :-1], (1, 0), value=True)
    position = torch.arange(num_blocks, device=own.device)
    first = torch.where(begins, position, 0).cummax(1).values
    longest = int(torch.where(own > 0, position - first, 0).max()) + 1
    return longest, own, first


def _lists_of_sequences(lists_1pnk: Tensor, own_bn: Tensor, first_bn: Tensor) -> Tensor:
    """Lists that count from the first block of a sequence -> lists of whole rows, [b, p, n, k]."""
    num_blocks = own_bn.shape[1]
    local = torch.arange(num_blocks, device=own_bn.device) - first_bn
    local = torch.where(own_bn > 0, local, 0).clamp(max=lists_1pnk.shape[2] - 1)
    lists = lists_1pnk[0][:, local].movedim(0, 1)  # [b, p, n, k]
    shifted = lists + first_bn[:, None, :, None]
    inside = shifted.clamp(max=num_blocks - 1)
    owner = own_bn[:, None, None].expand(-1, *inside.shape[1:3], -1).gather(3, inside.clamp(min=0))
    # a list may name blocks past the end of a short sequence: of the next one, or of none
    same = (owner == own_bn[:, None, :, None]) & (shifted < num_blocks) & (own_bn > 0)[:, None, :, None]
    return torch.where((lists >= 0) & same, shifted, -1)
