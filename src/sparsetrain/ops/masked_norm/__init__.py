"""LayerNorm and RMSNorm over channels that count by a mask: while a model grows, old ones count as 1, new ones as c."""

from __future__ import annotations

from torch import Tensor

from sparsetrain.ops.masked_norm.reference import reference_layer_norm, reference_rms_norm


def masked_layer_norm(
    x: Tensor,
    mask_d: Tensor,
    num_old: int,
    weight_d: Tensor | None,
    bias_d: Tensor | None,
    eps: float,
) -> Tensor:
    """((x − μ) / √(σ² + ε) · w + b) ⊙ c, with μ = Σ c·x / Σ c and σ² = Σ c·(x − μ)² / Σ c (arXiv 2305.02869).

    With c = 1 it is LayerNorm within rounding. With c = 0 on new channels it is, to the bit, what the old ones alone
    give: their sums are taken apart from those of the new, so that a longer row is not summed in another order.

    Equals: mu = (c * x).sum(-1, True) / c.sum(); var = (c * (x - mu) ** 2).sum(-1, True) / c.sum()
            y = ((x - mu) / (var + eps).sqrt() * w + b) * c

    Args:
        x: [..., d].
        mask_d: c, [d] in fp32 or better: 1 on the first `num_old` channels. It is read on its device: no
            synchronisation.
        num_old: of the d channels.
        weight_d, bias_d: [d], or None.
        eps: of the module's own norm.

    Returns:
        [..., d] in x's dtype; statistics are in fp32, in fp64 for fp64.

    Raises:
        ValueError: sizes that do not belong together.
    """
    _check("masked_layer_norm", x, mask_d, num_old)
    return reference_layer_norm(x, mask_d, num_old, weight_d, bias_d, eps)


def masked_rms_norm(x: Tensor, mask_d: Tensor, num_old: int, weight_d: Tensor | None, eps: float) -> Tensor:
    """(x / √(Σ c·x² / Σ c + ε) · w) ⊙ c; all else as of `masked_layer_norm`.

    Args:
        weight_d: the whole gain, [d]: of a norm that stores it less one, one more than is stored.
    """
    _check("masked_rms_norm", x, mask_d, num_old)
    return reference_rms_norm(x, mask_d, num_old, weight_d, eps)


def _check(op: str, x: Tensor, mask_d: Tensor, num_old: int) -> None:
    if mask_d.shape != x.shape[-1:] or not 0 < num_old <= x.shape[-1]:
        raise ValueError(
            f"{op}: x has {x.shape[-1]} channels, the mask is of shape {tuple(mask_d.shape)}, and num_old={num_old}. "
            "Give a mask of one value a channel, and from 1 to all of them as old."
        )
