"""Turning a trained FFN into a routed one with little loss: always-on units, blocks, router, compensation.

Pure functions on tensors. Legend: n calibration tokens, d model width, f hidden units, s always-on units, g blocks,
k blocks a token uses, r rank of the compensation.

Cut into contiguous blocks and routed at random, as published (arXiv 2312.10365), a trained model is ruined at step 0.
`convert_ffn` fits in closed form but for the clustering. With e_nu = (h_nu - mean_u)^2 |down column u|^2, the energy
of unit u at token n:
  1. always on: the s units of largest weighted mean energy, and before them every unit with a massive activation;
  2. blocks: equal, maximising the energy inside the k blocks that the router of the moment picks;
  3. router: ridge regression of the root of each block's energy on [x, 1];
  4. compensation: a shift for each block that is not used (`mean`), and a reduced-rank ridge regression on x
     (`lowrank`), both of what the routed FFN lacks given the choices its router makes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.methods.routed_ffn.partition import always_on, cut_blocks, unit_energy
from sparsetrain.methods.routed_ffn.regression import Ridge, with_constant
from sparsetrain.ops.routed_ffn import ACTIVATIONS

LOGIT_STD = 0.5  # spread of the fitted router's logits, inside the linear part of the sigmoid


@dataclass(frozen=True)
class FFNWeights:
    """A dense FFN: y = down(act(gate(x)) * up(x)), or y = down(act(up(x))) without a gate; fp32."""

    up_fd: Tensor
    down_df: Tensor
    gate_fd: Tensor | None = None
    up_bias_f: Tensor | None = None
    gate_bias_f: Tensor | None = None
    down_bias_d: Tensor | None = None
    activation: str = "silu"

    def hidden(self, x_nd: Tensor) -> Tensor:
        """h [n, f], what enters the down projection."""
        act = ACTIVATIONS[self.activation][0]
        up_nf = F.linear(x_nd, self.up_fd, self.up_bias_f)
        return act(up_nf) if self.gate_fd is None else act(F.linear(x_nd, self.gate_fd, self.gate_bias_f)) * up_nf

    def output(self, x_nd: Tensor) -> Tensor:
        """y [n, d]."""
        return F.linear(self.hidden(x_nd), self.down_df, self.down_bias_d)


@dataclass(frozen=True)
class Conversion:
    """What a routed FFN needs beside the dense weights; fp32.

    Args:
        order_f: int64 [f]; hidden unit order_f[i] moves to place i: always-on units, then block 0, block 1, ...
        num_shared: s.
        router_weight_gd, router_bias_g: logits = x W^T + b; a token uses the k largest.
        block_shift_gd: added for each block that is not used, or None.
        skip_a_rd, skip_b_dr: (x A^T) B^T is added for every token, or None.
        stats: energy_kept (share of the units' energy that runs), recall (of the k blocks of most energy),
            relative_error (weighted squared error of the output / weighted variance of the dense output).
    """

    order_f: Tensor
    num_shared: int
    router_weight_gd: Tensor
    router_bias_g: Tensor
    block_shift_gd: Tensor | None = None
    skip_a_rd: Tensor | None = None
    skip_b_dr: Tensor | None = None
    stats: dict[str, float] = field(default_factory=dict)

    @property
    def num_blocks(self) -> int:
        return len(self.router_bias_g)

    def used(self, x_nd: Tensor, num_active: int) -> Tensor:
        """[n, g]: 1 for the blocks a token uses, else 0."""
        return _top(F.linear(x_nd, self.router_weight_gd, self.router_bias_g), num_active)

    def spread(self, used_ng: Tensor) -> Tensor:
        """[n, f] in the new order: 1 for the hidden units that run."""
        width = (len(self.order_f) - self.num_shared) // self.num_blocks
        return F.pad(used_ng.repeat_interleave(width, dim=1), (self.num_shared, 0), value=1.0)

    def compensate(self, x_nd: Tensor, used_ng: Tensor) -> Tensor:
        """[n, d]: the shifts of the unused blocks, and the skip."""
        y_nd = torch.zeros_like(x_nd)
        if self.block_shift_gd is not None:
            y_nd = y_nd + (1 - used_ng) @ self.block_shift_gd
        if self.skip_a_rd is not None and self.skip_b_dr is not None:
            y_nd = y_nd + F.linear(F.linear(x_nd, self.skip_a_rd), self.skip_b_dr)
        return y_nd

    def apply(self, ffn: FFNWeights, x_nd: Tensor, num_active: int) -> Tensor:
        """The routed FFN's output [n, d] with all gates c_g = 1, by masking the dense FFN: no time is saved here."""
        used_ng = self.used(x_nd, num_active)
        active_nf = ffn.hidden(x_nd)[:, self.order_f] * self.spread(used_ng)
        return F.linear(active_nf, ffn.down_df[:, self.order_f], ffn.down_bias_d) + self.compensate(x_nd, used_ng)


@torch.no_grad()
def convert_ffn(
    ffn: FFNWeights,
    x_nd: Tensor,
    *,
    num_shared: int,
    num_blocks: int,
    num_active: int,
    compensation: str = "lowrank",
    rank: int = 64,
    weight_n: Tensor | None = None,
    target_nd: Tensor | None = None,
    iterations: int = 6,
    cluster_tokens: int = 4096,
    generator: torch.Generator | None = None,
) -> Conversion:
    """Fit a routed FFN to a dense one on calibration inputs, in the four steps of the module's docstring.

    Args:
        ffn: the dense weights, fp32.
        x_nd: inputs of the FFN, fp32; a few thousand tokens.
        num_shared, num_blocks, num_active: s, g, k; g divides f - s.
        compensation: none | mean | lowrank.
        rank: r of `lowrank`.
        weight_n: how much a token's squared error counts. Best is 1 / |residual stream after this FFN|^2; if None,
            1 / (|y_n - mean|^2 + its median), which also keeps massive activations from ruling the fit.
        target_nd: the output to approach, if not the dense FFN's.
        iterations: rounds of clustering by energy, and as many by the router's choice.
        cluster_tokens: tokens that step 2 reads, evenly spaced.
        generator: of the clustering's random start; the rest draws no random number.

    Returns:
        The conversion; `stats` are measured on x_nd.

    Raises:
        ValueError: sizes do not fit, `compensation` is unknown, or there are fewer tokens than predictors.

    Cost: 4/3 of the dense FFN over n tokens, two Cholesky factors and one eigendecomposition of [d, d], a few
    [n, f - s] x [f - s, g] products; scratch of 4 [n, f].
    """
    _check(ffn, x_nd, num_shared, num_blocks, num_active, compensation, rank)
    hidden_nf = ffn.hidden(x_nd)
    dense_nd = F.linear(hidden_nf, ffn.down_df, ffn.down_bias_d)
    target_nd = dense_nd if target_nd is None else target_nd
    weight_n = default_weight(dense_nd) if weight_n is None else weight_n
    weight_n = weight_n / weight_n.mean()
    energy_nf = unit_energy(hidden_nf, weight_n @ hidden_nf / len(x_nd), ffn.down_df)
    shared_s = always_on(energy_nf, weight_n, num_shared)
    near_c = _spaced(len(x_nd), cluster_tokens, x_nd.device)
    weighted_cf = energy_nf[near_c] * weight_n[near_c, None]
    order_f = cut_blocks(weighted_cf, x_nd[near_c], shared_s, num_blocks, num_active, iterations, generator)
    hidden_nf, down_df, energy_nf = hidden_nf[:, order_f], ffn.down_df[:, order_f], energy_nf[:, order_f]
    energy_ng = energy_nf[:, num_shared:].unflatten(1, (num_blocks, -1)).sum(dim=2)
    found = Conversion(order_f, num_shared, *_fit_router(x_nd, energy_ng.sqrt()))
    used_ng = found.used(x_nd, num_active)
    lack_nd = target_nd - F.linear(hidden_nf.mul_(found.spread(used_ng)), down_df, ffn.down_bias_d)
    found = replace(found, **_compensate(x_nd, used_ng, lack_nd, weight_n, compensation, rank))

    stats = _energy_stats(energy_nf, energy_ng, used_ng, weight_n, num_active)
    stats["relative_error"] = _relative_error(lack_nd - found.compensate(x_nd, used_ng), target_nd, weight_n)
    return replace(found, stats=stats)


def _spaced(num_tokens: int, most: int, device: torch.device) -> Tensor:
    """At most `most` token places, evenly spaced."""
    count = min(most, num_tokens)
    return torch.arange(count, device=device) * num_tokens // count


def _relative_error(error_nd: Tensor, target_nd: Tensor, weight_n: Tensor) -> float:
    error_n = error_nd.square().sum(dim=1)
    spread_n = (target_nd - weight_n @ target_nd / len(target_nd)).square().sum(dim=1)
    return float(weight_n @ error_n / (weight_n @ spread_n))


def _energy_stats(
    energy_nf: Tensor, energy_ng: Tensor, used_ng: Tensor, weight_n: Tensor, num_active: int
) -> dict[str, float]:
    lost_n = (energy_ng * (1 - used_ng)).sum(dim=1)
    best_ng = _top(energy_ng, num_active)
    return {
        "energy_kept": float(1 - weight_n @ lost_n / (weight_n @ energy_nf.sum(dim=1))),
        "recall": float((used_ng * best_ng).sum() / best_ng.sum()),
    }


def default_weight(y_nd: Tensor) -> Tensor:
    """1 / (|y_n - mean|^2 + its median) [n]: errors count relative to the output, and no token counts for much."""
    size_n = (y_nd - y_nd.mean(dim=0)).square().sum(dim=1)
    return 1 / (size_n + size_n.median() + 1e-30)


def _fit_router(x_nd: Tensor, root_ng: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [g, d] and bias [g] whose logits order the blocks as the fitted roots of their energies do."""
    ridge = Ridge(with_constant(x_nd), torch.ones_like(x_nd[:, 0]))
    slope_pg = ridge.fit(root_ng)
    fitted_ng = ridge.x_np @ slope_pg
    scale = LOGIT_STD / fitted_ng.std(correction=0).clamp_min(1e-30)
    return (slope_pg[:-1].T * scale).contiguous(), (slope_pg[-1] - fitted_ng.mean()) * scale


def _compensate(
    x_nd: Tensor, used_ng: Tensor, lack_nd: Tensor, weight_n: Tensor, compensation: str, rank: int
) -> dict[str, Tensor]:
    if compensation == "none":
        return {}
    found: dict[str, Tensor] = {}
    idle_ng = 1 - used_ng
    if compensation == "lowrank":
        ridge = Ridge(torch.cat([x_nd, idle_ng], dim=1), weight_n)
        d = x_nd.shape[1]
        found["skip_a_rd"], found["skip_b_dr"] = ridge.leading(ridge.fit(lack_nd), slice(0, d), rank)
        lack_nd = lack_nd - F.linear(F.linear(x_nd, found["skip_a_rd"]), found["skip_b_dr"])
    # the g - k unused blocks of every token add up to g - k: the shifts carry the constant too
    found["block_shift_gd"] = Ridge(idle_ng, weight_n, penalty=1e-4).fit(lack_nd)
    return found


def _top(score_ng: Tensor, num_active: int) -> Tensor:
    return torch.zeros_like(score_ng).scatter_(1, score_ng.topk(num_active, dim=1).indices, 1.0)


def _check(
    ffn: FFNWeights, x_nd: Tensor, num_shared: int, num_blocks: int, num_active: int, compensation: str, rank: int
) -> None:
    f, d = ffn.up_fd.shape
    if compensation not in ("none", "mean", "lowrank"):
        raise ValueError(f"compensation={compensation!r} is unknown. Choose none, mean or lowrank.")
    if not 0 <= num_shared < f or (f - num_shared) % num_blocks:
        raise ValueError(
            f"{f} hidden units less num_shared={num_shared} do not divide into num_blocks={num_blocks}. Change one."
        )
    if not 1 <= num_active <= num_blocks:
        raise ValueError(f"num_active={num_active} is outside 1..num_blocks={num_blocks}.")
    if x_nd.ndim != 2 or x_nd.shape[1] != d:
        raise ValueError(f"calibration inputs have shape {tuple(x_nd.shape)}; the FFN reads [n, {d}].")
    if compensation == "lowrank" and not 1 <= rank <= d:
        raise ValueError(f"rank={rank} is outside 1..{d}, the model width.")
    if len(x_nd) < 2 * num_blocks:
        raise ValueError(f"{len(x_nd)} calibration tokens for {num_blocks} blocks. Give some thousands of tokens.")
