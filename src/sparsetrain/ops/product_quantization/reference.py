"""Product quantisation as its equations: the specification. Legend in `__init__`."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_DISTANCE = 1e-5
"""Floor of a distance in the loss, so that a vector on a codeword has finite weights (read in the official code)."""


def per_head(codebook_gmew: Tensor, num_heads: int) -> Tensor:
    """[g, m, e, w] -> [h, m, e, w]."""
    return codebook_gmew.repeat_interleave(num_heads // len(codebook_gmew), 0)


def distances(x_bhtd: Tensor, codebook_gmew: Tensor, distance: str) -> Tensor:
    """[b, h, t, m, e]: |x - C| (l1) or |x - C|^2 (l2), summed channel by channel as every l1 backend does."""
    work = torch.promote_types(x_bhtd.dtype, torch.float32)
    _, m, _, w = codebook_gmew.shape
    x = x_bhtd.to(work).unflatten(-1, (m, 1, w))
    difference = x - per_head(codebook_gmew.to(work), x_bhtd.shape[1])[None, :, None]
    terms = difference.abs() if distance == "l1" else difference.square()
    total = terms[..., 0]
    for channel in range(1, w):
        total = total + terms[..., channel]
    return total


def encode(x_bhtd: Tensor, codebook_gmew: Tensor, distance: str) -> Tensor:
    """codes_bhtm; `argmin` takes the first of equal distances."""
    return distances(x_bhtd, codebook_gmew, distance).argmin(-1).to(torch.uint8)


def count(codes_bhtm: Tensor, num_codewords: int, block_tokens: int, valid_bt: Tensor | None) -> Tensor:
    """[b, h, m, n, e]: tokens of each block that have each code, in fp32."""
    b, h, t, m = codes_bhtm.shape
    n = -(-t // block_tokens)
    block = torch.arange(t, device=codes_bhtm.device)[:, None] // block_tokens
    bins = block * num_codewords + codes_bhtm.long()
    weight = torch.ones_like(bins, dtype=torch.float32)
    if valid_bt is not None:
        weight = weight * valid_bt[:, None, :, None]
    counts = torch.zeros(b, h, m, n * num_codewords, device=bins.device)
    return counts.scatter_add_(3, bins.transpose(2, 3), weight.transpose(2, 3)).view(b, h, m, n, num_codewords)


def decode(codes_bhtm: Tensor, codebook_gmew: Tensor) -> Tensor:
    """[b, h, t, m w]."""
    h, m = codes_bhtm.shape[1], codes_bhtm.shape[3]
    head = torch.arange(h, device=codes_bhtm.device)[:, None, None]
    subspace = torch.arange(m, device=codes_bhtm.device)
    return per_head(codebook_gmew, h)[head, subspace, codes_bhtm.long()].flatten(-2)


def loss_per_token(x_bhtd: Tensor, codebook_gmew: Tensor, distance: str, valid_bt: Tensor | None) -> Tensor:
    """[b, h, t]: (soft - hard)^2 + (x - hard)^2, each summed over the channels of a head; 0 where not valid."""
    work = torch.promote_types(x_bhtd.dtype, torch.float32)
    x, codebook = x_bhtd.to(work), codebook_gmew.to(work)
    if valid_bt is not None:  # before the equation: what padding holds must not reach a gradient, even times 0
        x = x.masked_fill(~valid_bt[:, None, :, None], 0)
    delta = distances(x, codebook, distance)
    # the square root has no gradient at 0, so the floor comes first
    delta = delta.clamp(min=MIN_DISTANCE) if distance == "l1" else delta.clamp(min=MIN_DISTANCE**2).sqrt()
    hard = decode(delta.argmin(-1), codebook)
    weights = delta.reciprocal()
    weights = weights / weights.sum(-1, keepdim=True)
    soft = torch.einsum("bhtme,hmew->bhtmw", weights, per_head(codebook, x.shape[1])).flatten(-2)
    per_token = ((soft - hard).square() + (x - hard).square()).sum(-1)
    return per_token if valid_bt is None else per_token.masked_fill(~valid_bt[:, None], 0)


def codebook_loss(x_bhtd: Tensor, codebook_gmew: Tensor, distance: str, valid_bt: Tensor | None) -> Tensor:
    """The mean over the elements of valid tokens; differentiable any number of times."""
    b, h, t, d = x_bhtd.shape
    count = b * t if valid_bt is None else valid_bt.sum().clamp(min=1)
    return loss_per_token(x_bhtd, codebook_gmew, distance, valid_bt).sum() / (count * h * d)
