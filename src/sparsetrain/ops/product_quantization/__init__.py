"""TEMPORARY simple version so that the package imports; helper 2 replaces this folder."""

from __future__ import annotations

import torch
from torch import Tensor


def _distances(x: Tensor, codebook: Tensor, distance: str) -> Tensor:
    """x [b, h, t, d], codebook [g, M, E, 8] -> [b, h, t, M, E]."""
    b, h, t, d = x.shape
    g, m, e, w = codebook.shape
    xs = x.float().view(b, h, t, m, 1, w)
    c = codebook.repeat_interleave(h // g, 0)[None, :, None]
    diff = xs - c
    return diff.abs().sum(-1) if distance == "l1" else diff.square().sum(-1)


def encode(x_bhtd: Tensor, codebook_gmew: Tensor, distance: str = "l1") -> Tensor:
    return _distances(x_bhtd.detach(), codebook_gmew.detach(), distance).argmin(-1).to(torch.uint8)


def codebook_loss(x_bhtd: Tensor, codebook_gmew: Tensor, distance: str = "l1", valid_bt: Tensor | None = None) -> Tensor:
    b, h, t, d = x_bhtd.shape
    g, m, e, w = codebook_gmew.shape
    delta = _distances(x_bhtd, codebook_gmew, distance).clamp(min=1e-5)
    weights = (1 / delta) / (1 / delta).sum(-1, keepdim=True)
    c = codebook_gmew.repeat_interleave(h // g, 0)
    soft = torch.einsum("bhtme,hmew->bhtmw", weights, c)
    hard = c[torch.arange(h)[:, None, None], torch.arange(m)[None, None], delta.argmin(-1)]
    xs = x_bhtd.float().view(b, h, t, m, w)
    per = ((soft - hard).square() + (xs - hard).square()).mean((-1, -2))
    if valid_bt is None:
        return per.mean()
    v = valid_bt[:, None].expand_as(per).float()
    return (per * v).sum() / v.sum().clamp(min=1)


def fit_codebook(x_nd: Tensor, num_codewords: int = 16, distance: str = "l1", iterations: int = 20, generator=None) -> Tensor:
    n, d = x_nd.shape
    xs = x_nd.float().view(n, d // 8, 8).transpose(0, 1)
    pick = torch.randint(n, (num_codewords,), generator=generator)
    c = xs[:, pick].clone()
    for _ in range(iterations):
        a = torch.cdist(xs, c, p=1 if distance == "l1" else 2).argmin(-1)
        for e in range(num_codewords):
            mask = (a == e).float()
            count = mask.sum(1)
            mean = (xs * mask[..., None]).sum(1) / count.clamp(min=1)[:, None]
            c[:, e] = torch.where(count[:, None] > 0, mean, c[:, e])
    return c
