"""k-means and k-medians of many small problems at once. Legend: p problems, n vectors, w width, e codewords."""

from __future__ import annotations

import torch
from torch import Tensor

DISTANCES = ("l1", "l2")


def cluster(x_pnw: Tensor, num_codewords: int, distance: str, iterations: int, generator: torch.Generator) -> Tensor:
    """Codewords [p, e, w]: alternate the nearest codeword of every vector and the centre of every codeword's."""
    norm = 1.0 if distance == "l1" else 2.0
    centres_pew = _spread(x_pnw, num_codewords, norm, generator)
    sorted_pnw = x_pnw.sort(dim=1) if distance == "l1" else None
    for _ in range(iterations):
        # 16 distances a vector of width 8: the sample is small, and calibration runs once
        chosen_pn = torch.cdist(x_pnw, centres_pew, p=norm).argmin(-1)
        members_pne = torch.nn.functional.one_hot(chosen_pn, num_codewords)
        count_pe1 = members_pne.sum(1)[..., None]
        if sorted_pnw is None:
            centre = members_pne.to(x_pnw.dtype).transpose(1, 2) @ x_pnw / count_pe1.clamp(min=1)
        else:
            centre = _medians(*sorted_pnw, chosen_pn, count_pe1[..., 0])
        centres_pew = torch.where(count_pe1 > 0, centre, centres_pew)
    return centres_pew


def _spread(x_pnw: Tensor, num_codewords: int, norm: float, generator: torch.Generator) -> Tensor:
    """k-means++: each further start is drawn with probability proportional to its distance^norm from those before."""
    n = x_pnw.shape[1]
    uniform_ep = torch.rand(num_codewords, len(x_pnw), generator=generator).to(x_pnw.device)
    weight_pn = torch.ones_like(x_pnw[..., 0])
    starts: list[Tensor] = []
    for uniform_p in uniform_ep:
        mass_pn = weight_pn.cumsum(1)
        index_p1 = torch.searchsorted(mass_pn, uniform_p[:, None] * mass_pn[:, -1:], right=True).clamp(max=n - 1)
        start_p1w = x_pnw.gather(1, index_p1[..., None].expand(-1, -1, x_pnw.shape[2]))
        near_pn = torch.cdist(x_pnw, start_p1w, p=norm)[..., 0] ** norm
        weight_pn = near_pn if not starts else torch.minimum(weight_pn, near_pn)
        starts.append(start_p1w)
    return torch.cat(starts, dim=1)


def _medians(values_pnw: Tensor, order_pnw: Tensor, chosen_pn: Tensor, count_pe: Tensor) -> Tensor:
    """[p, e, w]: the lower median of every codeword's vectors, channel by channel.

    Values are sorted once for all iterations; a stable sort by codeword keeps them sorted inside each.
    """
    width = values_pnw.shape[2]
    owner = chosen_pn.to(torch.uint8)[..., None].expand_as(order_pnw).gather(1, order_pnw)
    by_owner = owner.sort(dim=1, stable=True).indices
    middle_pe = count_pe.cumsum(1) - count_pe + (count_pe - 1).clamp(min=0) // 2
    middle_pew = middle_pe.clamp(max=values_pnw.shape[1] - 1)[..., None].expand(-1, -1, width)
    return values_pnw.gather(1, by_owner.gather(1, middle_pew))
