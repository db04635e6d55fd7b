"""PQ sparse attention inside a model: the codebooks, and what runs instead of dense attention.

code(x)[m] = nearest codeword of sub-space m;  keep the L keys whose codes score best for the query;  softmax over them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.core.anatomy import AttentionSite, trained_copy
from sparsetrain.core.found_once import found_once
from sparsetrain.methods.pq_attention.config import SUBSPACE, PQAttention
from sparsetrain.ops.block_sparse_attention import block_sparse_attention, dense_is_faster
from sparsetrain.ops.key_selection import Visibility, select_blocks, select_keys
from sparsetrain.ops.product_quantization import codebook_loss
from sparsetrain.ops.segments import align_segments, has_gaps, places_in_segments
from sparsetrain.ops.token_sparse_attention import token_sparse_attention
from sparsetrain.surgery.attention import AttentionCall, SparseAttention, say_dense
from sparsetrain.surgery.idle import attach_zeros, note, places_of
from sparsetrain.surgery.targets import DenseRows


class Codebook(nn.Module):
    """Codewords [H_kv or 1, M, E, 8] in fp32.

    A module of its own, so that PEFT keeps it trainable through `modules_to_save=["codebook"]`.
    """

    def __init__(self, scopes: int, subspaces: int, codewords: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(scopes, subspaces, codewords, SUBSPACE))

    def forward(self, like: Tensor) -> Tensor:
        """The codewords, on the device of `like` (PEFT's copy of a module is reached by calling it)."""
        return self.weight.to(like.device)


class PQSparseAttention(SparseAttention):
    """What answers for a converted attention.

    Attributes:
        dense_rows: knows the queries that attend densely; None: none ever does.
    """

    dense_rows: DenseRows | None = None

    adds_losses = True

    def __init__(self, config: PQAttention, site: AttentionSite, codewords: Tensor | None, fitted: bool = True) -> None:
        super().__init__()
        self.config, self.site = config, site
        scopes = site.num_kv_heads if config.codebook_scope == "head" else 1
        self.codebook = Codebook(scopes, site.head_dim // SUBSPACE, config.num_codewords)
        self.fitted = codewords is not None and fitted
        if codewords is not None:
            with torch.no_grad():
                self.codebook.weight.copy_(codewords)
        self.warming_up = False
        self.learning = True
        self.last: dict[str, Tensor] = {}

    def set_step(self, step: int, total_steps: int | None) -> None:
        self.warming_up = step < self.config.warmup(self.fitted) * (total_steps or 0)
        self.learning = self.warming_up or step % self.config.codebook_every == 0

    def tensors(self) -> dict[str, Tensor]:
        codewords: Tensor = trained_copy(self.codebook).weight
        return {"codebook": codewords.detach(), "fitted": torch.tensor(self.fitted)}

    @torch.no_grad()
    def take(self, owner: nn.Module, tensors: dict[str, Tensor]) -> None:
        trained_copy(self.codebook).weight.copy_(tensors["codebook"])
        self.fitted = bool(tensors["fitted"])

    def stats(self) -> dict[str, float]:
        known = {} if self.dense_rows is None else {"dense_rows": self.dense_rows.share}
        return {name: float(value) for name, value in (self.last | known).items()}

    def merge_error(self) -> str | None:
        if self.config.keep_ratio == 1 and self.config.num_keys is None:
            return None
        return f"keys are selected (keep_ratio={self.config.keep_ratio}, num_keys={self.config.num_keys})"

    def forward(self, call: AttentionCall) -> Tensor:
        """[b, h, t, d]."""
        if self.runs_dense:
            return self._with_zeros(call.dense(), idle=True)
        num_keys = call.k.shape[2]
        longest = num_keys if call.places is None else int(call.places.max()) + 1  # with what a cache has dropped
        everything = self._kept(longest) >= longest
        by_block = self.config.granularity == "block"
        dense_phase = self.warming_up or (self.dense_rows is not None and self.dense_rows.everywhere)
        if (
            dense_phase
            or (by_block and (_needs_dense(call) or self._loses(call)))
            or (everything and self.config.logit_clamp is None)
        ):
            return self.with_auxiliary_loss(call.dense(), call)
        rows_bt = None if self.dense_rows is None else self.dense_rows.of(call.q.shape[0] * call.q.shape[2])
        with self.watching():
            found = self._by_block(call, rows_bt) if by_block else self._by_token(call)
        out = call.with_padding(found)
        return self.with_auxiliary_loss(out if rows_bt is None else call.with_dense_rows(out, rows_bt), call)

    def _loses(self, call: AttentionCall) -> bool:
        """Whether dense attention was faster here when both were timed; says so once."""
        config = self.config
        timed = dense_is_faster(
            call.q,
            call.k,
            block_q=config.block_q,
            block_k=config.block_k,
            num_slots=-(-self._kept(call.k.shape[2]) // config.block_k),
            causal=call.causal,
        )
        if timed is not None:
            say_dense(type(config).__name__, timed)
        return timed is not None

    def _by_block(self, call: AttentionCall, unread_bt: Tensor | None) -> Tensor:
        """[b, h, t, d]; rows of `unread_bt`, bool [b, t], hold anything."""
        config, aligned = self.config, None
        if call.segments is not None:
            aligned = align_segments(call.segments, math.lcm(config.block_q, config.block_k))
            call = call.gathered(aligned)
            if unread_bt is not None:
                unread_bt = unread_bt.gather(1, aligned.source_bw) | (aligned.segments_bw == 0)
        kept_bs = self._kept_keys(call)
        lists = select_blocks(
            call.q,
            call.k,
            self.codebook(call.q),
            -(-kept_bs[:, :: config.block_q] // config.block_k),
            Visibility(call.causal, call.segments, call.window),
            scale=call.scale,
            score=config.score,
            distance=config.distance,
            local_tokens=config.local_tokens,
            keep_first=config.keep_first,
            block_q=config.block_q,
            block_k=config.block_k,
            max_slots=None if call.q.device.type == "cpu" else -(-self._most_kept(call.k.shape[2]) // config.block_k),
        )
        if unread_bt is not None:  # a block of queries that nobody reads keeps no keys, and costs nothing
            blocks_bi = F.pad(unread_bt, (0, -unread_bt.shape[1] % config.block_q), value=True)
            lists = lists.masked_fill(blocks_bi.unflatten(1, (-1, config.block_q)).all(-1)[:, None, :, None], -1)
        out = block_sparse_attention(
            call.q,
            call.k,
            call.v,
            lists,
            block_q=config.block_q,
            block_k=config.block_k,
            causal=call.causal,
            scale=call.scale,
            segments_bs=call.segments,
            window=call.window,
        )
        return out if aligned is None else aligned.scatter(out)

    def _by_token(self, call: AttentionCall) -> Tensor:
        config = self.config
        keys = select_keys(
            call.q,
            call.k,
            self.codebook(call.q),
            self._kept_keys(call)[:, call.k.shape[2] - call.q.shape[2] :],
            Visibility(call.causal, call.segments, call.window, call.places),
            score=config.score,
            selection=config.selection,
            distance=config.distance,
            local_tokens=config.local_tokens,
            keep_first=config.keep_first,
        )
        return token_sparse_attention(call.q, call.k, call.v, keys, scale=call.scale, logit_clamp=config.logit_clamp)

    def _kept(self, length: int) -> int:
        """L of a sequence of `length` keys."""
        return length if length < self.config.dense_below else self.config.kept_keys(length)

    def _most_kept(self, length: int) -> int:
        """The largest L of a sequence of up to `length` keys; one below `dense_below` keeps all."""
        return max(self._kept(length), min(length, self.config.dense_below - 1))

    def _kept_keys(self, call: AttentionCall) -> Tensor:
        """L of every token, [b, s], from the length of its own sequence."""
        (b, _, s, _), device, segments_bs = call.k.shape, call.k.device, call.segments
        if segments_bs is None:
            return torch.full((b, s), self._kept(s), device=device)
        if call.places is not None:  # beside a cache
            return self._kept_of(segments_bs, call.places)
        given = (self.config.keep_ratio, self.config.num_keys, self.config.selection, self.config.dense_below)
        places = lambda: places_in_segments(segments_bs)[0]  # noqa: E731
        return found_once(segments_bs, ("kept", given), lambda: self._kept_of(segments_bs, places()))

    def _kept_of(self, segments_bs: Tensor, place_bs: Tensor) -> Tensor:
        b, device = len(segments_bs), segments_bs.device
        length_bi = torch.zeros(b, int(segments_bs.max()) + 1, dtype=torch.int64, device=device)
        length_bi.scatter_reduce_(1, segments_bs.long(), place_bs.long() + 1, "amax")
        kept = torch.tensor([self._kept(n) for n in range(int(length_bi.max()) + 1)], device=device)
        return kept[length_bi].gather(1, segments_bs.long())

    def with_auxiliary_loss(self, out: Tensor, call: AttentionCall) -> Tensor:
        """out, with the codebook's loss on the queries and keys of the call attached in training."""
        weight, q, k = self.config.codebook_weight, call.q, call.k
        if not (self.training and torch.is_grad_enabled()):
            return out
        learns = self.learning and weight > 0
        if not learns or q.shape[2] == 1:
            return self._with_zeros(out, idle=not learns)
        codewords = self.codebook(q)
        if not codewords.requires_grad:
            return out
        note(places_of(trained_copy(self.codebook)), idle=False)
        if self.config.detach_qk:
            q, k = q.detach(), k.detach()
        valid = None if call.segments is None else call.segments > 0
        valid_q = None if valid is None else valid[:, valid.shape[1] - q.shape[2] :]
        loss = codebook_loss(q, codewords, self.config.distance, valid_q)
        loss = loss + codebook_loss(k, codewords, self.config.distance, valid)
        self.last["codebook_loss"] = loss.detach()
        return self.add_loss(out, loss, weight)

    def _with_zeros(self, out: Tensor, *, idle: bool) -> Tensor:
        """out; in a run of several ranks, with gradients of zeros for a codebook that gets none from this call."""
        return attach_zeros(out, places_of(trained_copy(self.codebook)), idle=idle) if self.training else out


def _needs_dense(call: AttentionCall) -> bool:
    """Queries at the end of cached keys, or a window that counts padding inside a sequence, which has no block."""
    if call.q.shape[2] != call.k.shape[2]:
        return True
    return call.window is not None and call.segments is not None and has_gaps(call.segments)
