"""Which hidden units are always on, and which block each of the others belongs to.

Legend: n tokens, d model width, f hidden units, s always-on units, u routed units, g blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsetrain.methods.routed_ffn.regression import Ridge, with_constant
from sparsetrain.ops.balanced_clustering import balanced_clustering

MASSIVE = 4.0  # a unit that once carries this multiple of a typical token's whole energy is always on, however rare


def unit_energy(hidden_nf: Tensor, mean_f: Tensor, down_df: Tensor) -> Tensor:
    """[n, f]: (h_nu - mean_u)^2 |down column u|^2, the squared error if unit u alone is replaced by its mean."""
    return ((hidden_nf - mean_f) * down_df.norm(dim=0)).square_()


def always_on(energy_nf: Tensor, weight_n: Tensor, num_shared: int) -> Tensor:
    """Ids [s], ascending: units with a massive activation at some token first, then by weighted mean energy.

    One unit that carries a few tokens (the attention sink's) has a small mean and ruins the sequence when it is dropped
    once. SmolLM2-135M has 0 to 8 such units a layer, up to 300,000 times the median token's energy (layer 11).
    """
    peak_f = energy_nf.amax(dim=0) / energy_nf.sum(dim=1).median().clamp_min(1e-30)
    mean_f = weight_n @ energy_nf
    rank_f = mean_f / mean_f.max().clamp_min(1e-30) + 2.0 * (peak_f > MASSIVE)
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
