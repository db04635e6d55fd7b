"""Which hidden units are always on, and which block each of the others belongs to.

Legend: n tokens, d model width, f hidden units, s always-on units, u routed units, g blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain.methods.routed_ffn.regression import Ridge, with_constant
from sparsetrain.ops.balanced_clustering import balanced_clustering

MASSIVE_SHARE = 0.3  # a unit that carries this share of one token's energy is always on, however rare


def unit_energy(hidden_nf: Tensor, mean_f: Tensor, down_df: Tensor, weight_n: Tensor) -> Tensor:
    """[n, f]: w_n (h_nu - mean_u)^2 |down column u|^2, the squared error if only unit u is replaced by its mean."""
    return ((hidden_nf - mean_f) * down_df.norm(dim=0)).square_().mul_(weight_n[:, None])


def always_on(energy_nf: Tensor, num_shared: int) -> Tensor:
    """Ids [s], ascending: units of a massive share at some token first, then by mean energy.

    One unit that carries a few tokens (the attention sink's, 2,974 against 10-40 elsewhere in SmolLM2-135M) has a small
    mean and ruins the sequence when it is dropped once.
    """
    share_f = (energy_nf / energy_nf.sum(dim=1, keepdim=True).clamp_min(1e-30)).amax(dim=0)
    mean_f = energy_nf.mean(dim=0)
    rank_f = mean_f / mean_f.max().clamp_min(1e-30) + 2.0 * (share_f > MASSIVE_SHARE)
    return rank_f.topk(num_shared).indices.sort().values


def cut_blocks(
    energy_nf: Tensor,
    x_nd: Tensor,
    shared_s: Tensor,
    num_blocks: int,
    num_active: int,
    iterations: int,
    generator: torch.Generator | None,
) -> Tensor:
    """order [f]: always-on units, then block 0, block 1, ... of equal width; dense order inside each.

    Two ascents: with the k blocks of most energy, then with the k blocks that a ridge regression of their energies'
    roots on [x, 1] ranks first, so that units gather where a linear router finds them.
    """
    routed_f = torch.ones(energy_nf.shape[1], dtype=torch.bool, device=energy_nf.device)
    routed_f[shared_s] = False
    routed_u = routed_f.nonzero().squeeze(1)
    energy_nu = energy_nf[:, routed_u]
    router = Ridge(with_constant(x_nd), torch.ones_like(x_nd[:, 0]))

    def predict(total_ng: Tensor) -> Tensor:
        return router.x_np @ router.fit(total_ng.sqrt())

    block_u = balanced_clustering(energy_nu, num_blocks, num_active, iterations=iterations, generator=generator)
    block_u = balanced_clustering(
        energy_nu, num_blocks, num_active, iterations=iterations, start_u=block_u, predict=predict
    )
    return torch.cat([shared_s, routed_u[block_u.argsort(stable=True)]])
