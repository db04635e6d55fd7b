"""Blocks of keys for blocks of queries, from histograms of codes. Legend as in the package; r probes of a block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.ops.key_selection.probes import attention_mass, mean_products
from sparsetrain.ops.key_selection.visibility import Visibility, sequences
from sparsetrain.ops.product_quantization import block_histograms, encode

PROBE_STRIDE = 4
"""Tokens between the probes of a causal block: at strides 1 and 4 the error was alike, and 4 reaches further back."""


@dataclass(frozen=True)
class BlockRule:
    """How blocks are cut and scored, and which of them are kept in any case; see `select_blocks`."""

    visibility: Visibility
    block_q: int
    block_k: int
    scale: float
    score: str
    distance: str
    local_tokens: int
    keep_first: bool
    num_probes: int
    max_slots: int | None = None


def select(
    q_bhtd: Tensor, k_bgsd: Tensor, codebook_gmew: Tensor | None, num_slots_bi: Tensor, rule: BlockRule
) -> Tensor:
    """Block ids [b, g, i, l], best first, then -1."""
    grid = Grid(q_bhtd.shape[2], rule.block_q, rule.block_k, rule.visibility, q_bhtd.device)
    seen, forced = grid.seen(), grid.forced(rule.local_tokens, rule.keep_first)
    rank_bgin = _scores(grid, q_bhtd, k_bgsd, codebook_gmew, rule)
    rank_bgin = rank_bgin.masked_fill(forced[:, None], torch.inf).masked_fill(~seen[:, None], -torch.inf)
    slots_bi = torch.maximum(num_slots_bi, forced.sum(-1))
    most = int(slots_bi.max()) if rule.max_slots is None else max(rule.max_slots, grid.most_forced(rule.local_tokens))
    most = min(most, rank_bgin.shape[-1])
    block = _in_order(rank_bgin, grid).topk(most, dim=-1).indices
    slot = torch.arange(most, device=block.device)
    empty = (rank_bgin.gather(-1, block) == -torch.inf) | (slot >= slots_bi[:, None, :, None])
    return block.to(torch.int32).masked_fill(empty, -1)


def _in_order(rank_bgin: Tensor, grid: Grid) -> Tensor:
    """Integers ordered by (rank, nearness, lower id): equal ranks are broken alike on every device and length."""
    bits = (rank_bgin.float() + 0.0).contiguous().view(torch.int32).long()  # + 0: -0 is 0
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # fp32 bits, ordered as the numbers are
    num_blocks = rank_bgin.shape[-1]
    away_in = torch.arange(num_blocks, device=bits.device) - (grid.first_q // grid.block_k)[:, None]
    return rising * (2 * num_blocks + 1) + (2 * num_blocks - 2 * away_in.abs() - (away_in > 0).long())


class Grid:
    """Where query blocks and key blocks stand, and which of them see each other: [b or 1, i, n] bool."""

    def __init__(self, tokens: int, block_q: int, block_k: int, visibility: Visibility, device: torch.device) -> None:
        self.tokens, self.block_q, self.block_k, self.visibility = tokens, block_q, block_k, visibility
        self.first_q = torch.arange(0, tokens, block_q, device=device)
        self.first_k = torch.arange(0, tokens, block_k, device=device)
        self.last_q = (self.first_q + block_q).clamp(max=tokens) - 1
        self.last_k = (self.first_k + block_k).clamp(max=tokens) - 1
        segments = visibility.segments_bs
        # sequences start at block boundaries, so the first token of a block names its segment
        self.segments_q = None if segments is None else segments[:, self.first_q]
        self.segments_k = None if segments is None else segments[:, self.first_k]

    def seen(self) -> Tensor:
        near = self.first_q[:, None] - self.last_k[None]
        far = self.last_q[:, None] - self.first_k[None]
        seen = far >= 0 if self.visibility.causal else torch.ones_like(far, dtype=torch.bool)
        if self.visibility.window is not None:
            seen = seen & (near < self.visibility.window) & (far > -self.visibility.window)
        return self._same_segment(seen[None])

    def forced(self, local_tokens: int, keep_first: bool) -> Tensor:
        before = local_tokens if self.visibility.causal else local_tokens // 2
        after = 0 if self.visibility.causal else before
        local = (self.last_k[None] >= self.first_q[:, None] - before) & (
            self.first_k[None] <= self.last_q[:, None] + after
        )
        forced = local[None] & self.seen()
        if keep_first:
            segments = self.segments_k
            first = torch.zeros(1, len(self.first_k), dtype=torch.bool, device=self.first_k.device)
            first[:, 0] = True
            if segments is not None:
                first = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True) & (segments > 0)
            forced = forced | (first[:, None] & self.seen())
        return forced

    def most_forced(self, local_tokens: int) -> int:
        """At least as many blocks as `forced` keeps for any query block: a run of tokens, and the first block."""
        return -(-(self.block_q + 2 * local_tokens) // self.block_k) + 2

    def _same_segment(self, seen: Tensor) -> Tensor:
        if self.segments_q is None or self.segments_k is None:
            return seen
        own = self.segments_q[:, :, None]
        return seen & (own == self.segments_k[:, None]) & (own > 0)

    def probes(self, num_probes: int) -> Tensor:
        """Positions [i, r]; before the first token of the row they are negative."""
        if self.visibility.causal:
            return self.first_q[:, None] - PROBE_STRIDE * torch.arange(num_probes, device=self.first_q.device)
        spread = (torch.arange(num_probes, device=self.first_q.device) * 2 + 1) * self.block_q // (2 * num_probes)
        return (self.first_q[:, None] + spread).clamp(max=self.tokens - 1)


def _scores(grid: Grid, q: Tensor, k: Tensor, codebook: Tensor | None, rule: BlockRule) -> Tensor:
    """How much each query block wants each key block, [b, g, i, n]."""
    b, h, t, d = q.shape
    g = k.shape[1]
    place_ir = grid.probes(rule.num_probes)
    i, r = place_ir.shape
    valid_bir = (place_ir >= 0).expand(b, -1, -1)
    segments = grid.visibility.segments_bs
    if segments is not None and grid.segments_q is not None:
        own = grid.segments_q[:, :, None]
        valid_bir = valid_bir & (segments[:, place_ir.clamp(min=0)] == own) & (own > 0)
    if rule.score in ("attention", "mean"):
        seq = sequences(grid.visibility, b, t, q.device)
        if rule.score == "mean":
            return mean_products(q, k, place_ir, valid_bir, grid.block_k, seq)
        return attention_mass(q, k, place_ir, valid_bir, grid.block_k, rule.scale, grid.visibility, seq)
    assert codebook is not None
    _, m, e, _w = codebook.shape
    codebook = codebook.float().expand(g, -1, -1, -1)
    valid_bs = None if segments is None else segments > 0
    hist_bgmne = block_histograms(k, codebook, grid.block_k, rule.distance, valid_bs)
    probe = q.float().view(b, g, h // g, t, d)[:, :, :, place_ir.clamp(min=0).flatten()]  # [b, g, p, i·r, d]
    # a causal probe at position p may score a block only when it has read all of it
    read_bxn = grid.seen().repeat_interleave(r, 1) & valid_bir.flatten(1)[..., None]
    if grid.visibility.causal:
        read_bxn = read_bxn & (grid.last_k <= place_ir.flatten()[:, None])
    if rule.score == "table":
        rank = _mass(probe, hist_bgmne, codebook, rule.scale, read_bxn)
    else:
        hist_probe = F.one_hot(encode(probe.flatten(1, 2), codebook, rule.distance).long(), e).float()
        hist_probe = hist_probe.view(b, g, -1, i * r, m * e).sum(2)
        rank = hist_probe @ hist_bgmne.transpose(2, 3).flatten(3).mT
        rank = rank.masked_fill(~read_bxn[:, None], 0)
    return rank.view(b, g, i, r, -1).sum(3)


def _mass(probe: Tensor, hist: Tensor, codebook: Tensor, scale: float, read_bxn: Tensor) -> Tensor:
    """Estimated softmax mass of each block, summed over the heads of a group: [b, g, x, n] for x probes."""
    m, w = codebook.shape[1], codebook.shape[3]
    table = torch.einsum("bgpxmw,gmew->bgpmxe", probe.unflatten(-1, (m, w)), codebook) * scale
    peak = table.amax(-1, keepdim=True)
    table = (table - peak).exp_()
    total = torch.zeros(*probe.shape[:4], hist.shape[3], dtype=probe.dtype, device=probe.device)
    # products of four sub-spaces at a time: one logarithm instead of four, and no underflow
    for start in range(0, m, 4):
        product = None
        for space in range(start, min(start + 4, m)):
            part = (table[:, :, :, space] @ hist[:, :, None, space].mT).clamp_(min=1e-9)
            product = part if product is None else product.mul_(part)
        assert product is not None
        total += product.log_()
    # per block, log of the number of keys: a short block holds less
    total += hist[:, :, None, 0].sum(-1)[..., None, :].clamp(min=1e-9).log() * (1 - m)
    total.masked_fill_(~read_bxn[:, None, None], -torch.inf)
    return total.softmax(-1).nan_to_num_(0).sum(2)
