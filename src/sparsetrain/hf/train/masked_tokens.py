"""Masked language modelling: of the tokens of packed text some are hidden, and the model says which they were.

Of a hundred tokens fifteen are asked for; of ten of these eight are replaced by the mask token, one by any token, and
one stays (BERT, arXiv 1810.04805, section 3.1). A row's tokens draw which, so that every run, resumed or on other
ranks, and every model that is compared hides the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.data.collate import IGNORED_LABEL
from sparsetrain.hf.train.tasks import Batch, Scores

ASKED, MASKED, OTHER = 0.15, 0.8, 0.1
"""Share of the tokens that are asked for; of these, shares that are replaced by the mask token and by any token."""


def hidden(ids_bt: Tensor, labels_bt: Tensor, mask_id: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """(ids as the model sees them, which tokens are asked for), both [b, t]; padding is never asked for."""
    seen_bt, asked_bt = ids_bt.clone(), torch.zeros_like(ids_bt, dtype=torch.bool)
    places_t = torch.arange(1, ids_bt.shape[1] + 1)
    for row, ids_t in enumerate(ids_bt.cpu()):
        draw = torch.Generator().manual_seed(int((ids_t * places_t).sum()) % 2**63)
        asked_t, how_t = (torch.rand(ids_t.shape, generator=draw) for _ in range(2))
        other_t = torch.randint(0, vocabulary, ids_t.shape, generator=draw)
        asked_t = asked_t < ASKED
        changed_t = torch.where(how_t < MASKED, mask_id, torch.where(how_t < MASKED + OTHER, other_t, ids_t))
        seen_bt[row] = torch.where(asked_t, changed_t, ids_t).to(ids_bt.device)
        asked_bt[row] = asked_t.to(ids_bt.device)
    asked_bt &= labels_bt != IGNORED_LABEL
    return torch.where(asked_bt, seen_bt, ids_bt), asked_bt


def _asked(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [k, v] and labels [k] of the tokens that are asked for, and the rows [k] they stand in."""
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    config = model.config
    mask_id = getattr(config, "mask_token_id", None)
    mask_id = config.pad_token_id if mask_id is None else mask_id
    ids_bt = inputs["input_ids"]
    inputs["input_ids"], asked_bt = hidden(ids_bt, batch["labels"], mask_id, config.vocab_size)
    return model(**inputs).logits[asked_bt], ids_bt[asked_bt], asked_bt.nonzero()[:, 0]


def masked_loss(model: Any, batch: Batch) -> Tensor:
    """Mean over the tokens that are asked for; 0 where a batch is too short to have one."""
    logits_kv, labels_k, _ = _asked(model, batch)
    return F.cross_entropy(logits_kv.float(), labels_k, reduction="sum") / max(1, len(labels_k))


def masked_scores(model: Any, batch: Batch) -> Scores:
    """Negative log-likelihood of the tokens that are asked for, also by row."""
    logits_kv, labels_k, row_k = _asked(model, batch)
    losses_k = F.cross_entropy(logits_kv.float(), labels_k, reduction="none").double()
    rows = len(batch["input_ids"])
    loss_b = torch.zeros(rows, dtype=torch.float64, device=losses_k.device).index_add_(0, row_k, losses_k)
    count_b = torch.bincount(row_k, minlength=rows)
    by_row = {"loss": loss_b.tolist(), "count": count_b.double().tolist()}
    return Scores(float(loss_b.sum()), int(count_b.sum()), {}, by_row)
