"""How PQ sparse attention meets a model: its edits, their costs, and the codebooks' start from calibration data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, AttentionSite, Undo, describe, submodule
from sparsetrain.core.cost import Cost, attention_cost, mean_visible_keys
from sparsetrain.methods.pq_attention.config import SUBSPACE, PQAttention
from sparsetrain.methods.pq_attention.module import PQSparseAttention
from sparsetrain.ops.product_quantization import fit_codebook
from sparsetrain.surgery.attention import (
    AttentionCall,
    attention_claim,
    attention_names,
    install_attention,
    refuse_attention,
    watching,
)
from sparsetrain.surgery.calibration import blocks_only
from sparsetrain.surgery.edits import edits_at
from sparsetrain.surgery.method import QUANTISED, Edit, Method, State, register_method
from sparsetrain.surgery.site import Site
from sparsetrain.surgery.targets import at_most_dense, refuse_rows, see_targets

CALIBRATION_TOKENS = 4096
"""Tokens a codebook is fitted on: 16 codewords of width 8 are known well from a few thousand."""


def edits(config: PQAttention, anatomy: Anatomy, model: nn.Module) -> list[Edit]:
    """One edit for each attention the config takes.

    Raises:
        ValueError: a head width that cannot be cut into sub-spaces, attention dropout, or an adapter without attention.
    """

    def check(site: AttentionSite) -> None:
        config.check_head(site.name, site.head_dim)
        refuse_attention("pq_attention", site, anatomy)

    return edits_at(
        config,
        anatomy,
        anatomy.attentions,
        install,
        check=check,
        cost=lambda site, tokens: costs(config, site, tokens),
        claims=attention_claim,
        note=lambda _site: _note(config),
    )


def _note(config: PQAttention) -> str:
    kept = f"{config.num_keys} keys" if config.num_keys is not None else f"{config.keep_ratio:.3g} of the keys"
    unit = f"{config.block_q}×{config.block_k} blocks" if config.granularity == "block" else "single keys"
    return f"{kept}, {unit}" + ("" if config.dense_tokens == "none" else "; targets dense, at most this")


def costs(config: PQAttention, site: AttentionSite, num_tokens: int) -> tuple[Cost, Cost]:
    """(dense, sparse) per token at a sequence length, without the projections, which are unchanged.

    Sparse: the kept keys and the encoding of q and k (E distances a sub-space). Selection itself is integer work.
    """
    visible = mean_visible_keys(num_tokens, site.causal, site.window)
    shape = (site.num_heads, site.num_kv_heads, site.head_dim)
    dense = attention_cost(*shape, visible)
    scopes = site.num_kv_heads if config.codebook_scope == "head" else 1
    codewords = scopes * (site.head_dim // SUBSPACE) * config.num_codewords * SUBSPACE
    kept = min(float(config.kept_keys(num_tokens)), visible)
    if kept >= visible or num_tokens < config.dense_below:
        return dense, dense + Cost(num_params=codewords)
    encode = 2.0 * (site.num_heads + site.num_kv_heads) * site.head_dim * config.num_codewords
    sparse = attention_cost(*shape, kept)
    sparse = Cost(num_params=codewords, flops=sparse.flops + encode, saved_elements=sparse.saved_elements)
    return dense, at_most_dense(config, dense, sparse, encode)


def install(
    model: nn.Module, tensors: dict[str, Tensor], config: PQAttention, site: AttentionSite
) -> tuple[Undo, Site]:
    """Give the attention its codebook, and let the model call our attention function."""
    # codewords are compared in fp32 whatever the model's dtype, so that all backends agree on codes
    sparse = PQSparseAttention(config, site, tensors.get("codebook"), bool(tensors.get("fitted", True)))
    undo = install_attention(model, site, sparse)
    if config.dense_tokens == "targets":
        undo = see_targets(model, describe(model), site.name, sparse, undo)
    return undo, sparse


class _Capture:
    """Answers for an attention during calibration: keeps a sample of q and k, and runs dense."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.samples: list[Tensor] = []

    def __call__(self, call: AttentionCall) -> Tensor:
        groups, width = call.k.shape[1], call.q.shape[-1]
        # [b, h, t, d] -> [g, tokens, d]: the query heads of a group share the codebook of its keys
        queries = call.q.unflatten(1, (groups, -1)).permute(1, 0, 2, 3, 4)
        keys = call.k.permute(1, 0, 2, 3)
        if call.segments is not None:
            valid = call.segments > 0
            queries = queries[:, valid[:, None].expand(-1, queries.shape[2], -1)]
            keys = keys[:, valid]
        for part in (queries.reshape(groups, -1, width), keys.reshape(groups, -1, width)):
            stride = max(1, part.shape[1] // self.num_tokens)
            self.samples.append(part[:, ::stride].float())
        return call.dense()


def prepare(
    model: nn.Module, planned: list[Edit], batches: list[dict[str, Tensor]], progress: Callable[[str, float], None]
) -> State:
    """Fit every site's codebook to the queries and keys of the calibration batches."""
    config: Any = planned[0].config
    if not config.needs_calibration:
        return {}
    if not batches:
        warnings.warn(
            "pq_attention: no calibration batches, so codebooks start random and keys are chosen badly at first. "
            "Pass calibration=[batches] to sparsify(), or codebook_init='normal' to say that this is meant.",
            stacklevel=4,
        )
        return {}
    batches = _spread(batches)
    captures = {edit: _Capture(CALIBRATION_TOKENS // (2 * len(batches))) for edit in planned}
    last = submodule(model, describe(model).blocks[planned[-1].layer].name)
    with watching(model, {edit.site: capture for edit, capture in captures.items()}), blocks_only(model, last) as run:
        for i, batch in enumerate(batches):
            progress("pq_attention: reading queries and keys", i / len(batches))
            run(batch)
    state: State = {}
    for i, (edit, capture) in enumerate(captures.items()):
        progress("pq_attention: fitting codebooks", i / len(captures))
        state[edit.key] = {"codebook": _fit(config, torch.cat(capture.samples, dim=1))}
    return state


def _spread(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Evenly spaced batches: four, or as many as hold CALIBRATION_TOKENS."""
    tokens = next(iter(batches[0].values())).shape[:2].numel()
    count = min(len(batches), max(4, -(-CALIBRATION_TOKENS // tokens)))
    return [batches[i * len(batches) // count] for i in range(count)]


def _fit(config: PQAttention, sample_gnd: Tensor) -> Tensor:
    """[g, n, d] -> codewords [g or 1, M, E, 8]."""
    if config.codebook_scope == "layer":
        sample_gnd = sample_gnd.reshape(1, -1, sample_gnd.shape[-1])
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    return torch.stack(
        [fit_codebook(x, config.num_codewords, config.distance, generator=generator) for x in sample_gnd]
    )


register_method(
    PQAttention,
    Method(
        edits=edits,
        site_names=attention_names,
        prepare=prepare,
        modules_to_save=("codebook",),
        refuse=refuse_rows,
        limits={
            **dict.fromkeys(QUANTISED, "it has not been tried on quantised models. Load the model in bf16 or fp32"),
        },
    ),
)
