"""`new_entry_steps='own'`: Adam counts the steps of new entries from their first, and not from the parameter's.

    u(k) = lr · m / (1 − β₁ᵏ) / (√(v / (1 − β₂ᵏ)) + ε)

An optimizer has one count for a parameter, t of a run that is long under way, and moments of new entries begin at 0:
their updates are then (1 − β₁ᵏ) / √(1 − β₂ᵏ) times too large, 3.16 at k = 1 and 6.6 at k = 13 for the default betas. So
after each step of a ramp u(t) is taken back and u(k) made; after its last one m and v are divided by 1 − βᵏ, with which
the parameter's own count goes on where k was.
"""

from __future__ import annotations

import weakref
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from sparsetrain.methods.masked_growth.module import RampSite

_FOLLOWED: weakref.WeakSet[RampSite] = weakref.WeakSet()


def follow(site: RampSite) -> None:
    """Correct the updates of a site's new entries after each step of whatever optimizer holds them."""
    _FOLLOWED.add(site)
    _begin_following()


@torch.no_grad()
def correct(parameter: Tensor, new: Tensor, state: dict[str, Any], group: dict[str, Any], count: int) -> None:
    """Make the update that was just made of the entries `new` (bool) one of their own `count`-th step."""
    beta1, beta2 = group["betas"]
    step, v = float(state["step"]), state.get("max_exp_avg_sq", state["exp_avg_sq"])

    def update(k: float) -> Tensor:
        return group["lr"] * (state["exp_avg"] / (1 - beta1**k)) / ((v / (1 - beta2**k)).sqrt() + group["eps"])

    parameter.add_(torch.where(new, update(step) - update(count), 0.0))


@torch.no_grad()
def settle(new: Tensor, state: dict[str, Any], group: dict[str, Any], count: int) -> None:
    """Divide the moments of the entries `new` by 1 − β^count."""
    for name, beta in zip(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), (*group["betas"], group["betas"][1])):
        if name in state:
            state[name].copy_(torch.where(new, state[name] / (1 - beta**count), state[name]))


@cache
def _begin_following() -> None:
    """Register with torch, once a process, so that any loop is followed."""

    def after(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        held = {id(p): group for group in optimizer.param_groups for p in group["params"]} if _FOLLOWED else {}
        for site in list(_FOLLOWED):
            for parameter, corner, parts in site.entries:
                group, state = held.get(id(parameter)), optimizer.state.get(parameter, {})
                if corner is None or group is None or "exp_avg" not in state or not site.count:
                    continue  # a new layer's state is its own
                new = _new(parameter, corner, parts)
                correct(parameter, new, state, group, site.count)
                if site.is_last:
                    settle(new, state, group, site.count)

    register_optimizer_step_post_hook(after)


def _new(parameter: Tensor, corner: torch.Size, parts: tuple[int, int] | None) -> Tensor:
    """Which entries of a parameter lie outside of its old corner, bool."""
    new = torch.ones_like(parameter, dtype=torch.bool)
    old = new if parts is None else new.unflatten(parts[0], (parts[1], -1))
    old[tuple(slice(0, size) for size in corner)] = False
    return new
