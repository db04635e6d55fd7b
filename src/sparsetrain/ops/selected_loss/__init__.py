"""Cross-entropy of the rows that have a target, from the hidden states, without the logits of a whole batch.

loss = Σ_i w_i · (logsumexp(z_i) - z_i[target_i]) / normaliser,   z_i = x_i Wᵀ + b,   over rows with a target.

Equals:
    kept = targets != ignore_index
    ce = F.cross_entropy((x[kept] @ W.T + b).float(), targets[kept], reduction="none")
    loss = (ce * weights[kept]).sum() / normaliser

Legend: n rows, d model width, v words of the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.core.backend import choose
from sparsetrain.ops.selected_loss.chunked import chunked_loss
from sparsetrain.ops.selected_loss.reference import reference_loss


def selected_loss(
    x_nd: Tensor,
    weight_vd: Tensor,
    target_n: Tensor,
    *,
    bias_v: Tensor | None = None,
    row_weight_n: Tensor | None = None,
    normaliser: Tensor | float | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_rows: int = 128,
    backend: str = "auto",
) -> Tensor:
    """The loss head on the rows that have a target; see the module for the equation.

    Labels are shifted by the caller: row i predicts target i.

    Args:
        x_nd: hidden states after the last norm.
        weight_vd: the head's weight.
        target_n: int64; rows with `ignore_index` cost nothing.
        bias_v: the head's bias.
        row_weight_n: importance of each row, 1 by default.
        normaliser: what the sum is divided by, e.g. the number of targets of an accumulated step; by default the number
            of rows with a target here.
        softcap: z = softcap · tanh(z / softcap), as in Gemma-2.
        chunk_rows: rows whose logits exist at a time: 128 rows of 50,000 words are 25 MiB in fp32.

    Returns: a scalar in fp32 (fp64 for fp64 inputs); 0 with zero gradients when no row has a target.

    Cost: the head's products for rows with a target, forward and backward, both run in the forward; saved are dx [n, d]
        of those rows, and dW if the head is trained.
    """
    available: dict[str, str | None] = {"torch": None, "reference": None}
    run = chunked_loss if choose("selected_loss", backend, available) == "torch" else reference_loss
    kept = (target_n != ignore_index).nonzero().flatten()
    if len(kept) < len(target_n):
        x_nd, target_n = x_nd.index_select(0, kept), target_n[kept]
        row_weight_n = None if row_weight_n is None else row_weight_n[kept]
    count = float(len(kept)) if normaliser is None else normaliser
    scale_n = torch.ones(len(kept), device=x_nd.device) if row_weight_n is None else row_weight_n
    scale_n = scale_n.to(x_nd.dtype if x_nd.dtype == torch.float64 else torch.float32) / (count if len(kept) else 1.0)
    return run(x_nd, weight_vd, bias_v, target_n, scale_n, softcap, chunk_rows)


def row_scores(
    x_nd: Tensor,
    weight_vd: Tensor,
    target_n: Tensor,
    *,
    bias_v: Tensor | None = None,
    softcap: float | None = None,
    chunk_rows: int = 128,
) -> tuple[Tensor, Tensor]:
    """(cross-entropy, norm of its gradient with respect to the head's weight) of every row, both fp32 [n].

    dL/dW = dz xᵀ with dz = softmax(z) - onehot(target), so its norm is ‖dz‖·‖x‖ and needs no second product (a soft
    cap's derivative is left out of dz).
    """
    losses, norms = [], []
    for start in range(0, len(x_nd), chunk_rows):
        x, target = x_nd[start : start + chunk_rows], target_n[start : start + chunk_rows, None]
        z = F.linear(x, weight_vd, bias_v).float()
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        log_p = torch.log_softmax(z, 1)
        of_target = log_p.gather(1, target)[:, 0]
        dz = log_p.exp_().scatter_add_(1, target, log_p.new_full(target.shape, -1.0))
        losses.append(-of_target)
        norms.append(dz.norm(dim=1) * x.float().norm(dim=1))
    empty = x_nd.new_zeros(0, dtype=torch.float32)
    return torch.cat([empty, *losses]), torch.cat([empty, *norms])
