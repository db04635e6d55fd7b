"""PQ sparse attention inside a model: the codebooks, and what runs instead of dense attention.

code(x)[m] = nearest codeword of sub-space m;  keep the L keys whose codes agree most with the query's;  softmax over them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import AttentionSite
from sparsetrain.methods.pq_attention.config import SUBSPACE, PQAttention
from sparsetrain.ops.block_sparse_attention import block_sparse_attention
from sparsetrain.ops.key_selection import select_blocks, select_keys
from sparsetrain.ops.product_quantization import codebook_loss, encode
from sparsetrain.ops.token_sparse_attention import token_sparse_attention
from sparsetrain.surgery.auxiliary import attach_loss


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


class PQSparseAttention(nn.Module):
    """What `module.sparse_attention` is on a converted attention."""

    def __init__(self, config: PQAttention, site: AttentionSite, codewords: Tensor | None) -> None:
        super().__init__()
        self.config, self.site = config, site
        scopes = site.num_kv_heads if config.codebook_scope == "head" else 1
        self.codebook = Codebook(scopes, site.head_dim // SUBSPACE, config.num_codewords)
        self.fitted = codewords is not None
        if codewords is not None:
            with torch.no_grad():
                self.codebook.weight.copy_(codewords)
        self.warming_up = False
        self.learning = True
        self.loss_scale = 1.0
        self.last: dict[str, Tensor] = {}

    def set_step(self, step: int, total_steps: int | None, loss_scale: float) -> None:
        self.warming_up = step < self.config.warmup(self.fitted) * (total_steps or 0)
        self.learning = self.warming_up or step % self.config.codebook_every == 0
        self.loss_scale = loss_scale

    def tensors(self) -> dict[str, Tensor]:
        codebook = self.codebook
        if hasattr(codebook, "modules_to_save"):  # PEFT trains a copy
            codebook = codebook.modules_to_save[codebook.active_adapters[0]]  # type: ignore[index, operator, union-attr]
        return {"codebook": codebook.weight.detach()}

    def stats(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.last.items()}

    def merge_error(self) -> str | None:
        if self.config.keep_ratio == 1 and self.config.num_keys is None:
            return None
        return f"keys are selected (keep_ratio={self.config.keep_ratio}, num_keys={self.config.num_keys})"

    def forward(
        self,
        q_bhtd: Tensor,
        k_bgsd: Tensor,
        v_bgsd: Tensor,
        *,
        causal: bool,
        scale: float,
        segments_bs: Tensor | None,
        window: int | None,
        dense: Callable[[], Tensor],
    ) -> Tensor:
        """[b, h, t, d] -> [b, h, t, d]; `dense()` gives the dense attention of the same call."""
        num_keys = k_bgsd.shape[2]
        everything = self.config.kept_keys(num_keys) >= num_keys or num_keys < self.config.dense_below
        if everything and self.config.logit_clamp is None:
            out = dense()
        elif self.warming_up:
            out = dense()
        elif self.config.granularity == "token":
            out = self._by_token(q_bhtd, k_bgsd, v_bgsd, causal, scale, segments_bs, window)
        else:
            out = self._by_block(q_bhtd, k_bgsd, v_bgsd, causal, scale, segments_bs, window)
        return self._with_codebook_loss(out, q_bhtd, k_bgsd, segments_bs)

    def _with_codebook_loss(self, out: Tensor, q: Tensor, k: Tensor, segments_bs: Tensor | None) -> Tensor:
        weight = self.config.codebook_weight
        if not (self.training and self.learning and torch.is_grad_enabled() and weight and q.shape[2] > 1):
            return out
        codewords = self.codebook(q)
        if not (codewords.requires_grad and out.requires_grad):
            return out
        if self.config.detach_qk:
            q, k = q.detach(), k.detach()
        valid = None if segments_bs is None else segments_bs > 0
        valid_q = None if valid is None else valid[:, valid.shape[1] - q.shape[2] :]
        loss = codebook_loss(q, codewords, self.config.distance, valid_q)
        loss = loss + codebook_loss(k, codewords, self.config.distance, valid)
        self.last["codebook_loss"] = loss.detach()
        return attach_loss(out, loss, weight * self.loss_scale)
