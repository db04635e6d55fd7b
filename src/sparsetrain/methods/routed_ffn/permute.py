"""Reordering an FFN's hidden units in memory, while everything outside the process sees the dense order.

An FFN's output does not depend on the order of its hidden units, so blocks of units can be made contiguous by moving
rows of the first matrices and columns of the last. State dicts are translated on the way out and in: checkpoints,
adapters and exports hold the dense order, and load into plain models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import FFNSite, Undo
from sparsetrain.core.shards import as_shard, whole


def hidden_dim(site: FFNSite, name: str) -> int | None:
    """The dimension of hidden units in a parameter of the FFN's owner, by its relative name; None if it has none."""
    for linear, is_down in ((site.up, False), (site.gate, False), (site.down, True)):
        if linear is None or not name.startswith(linear + "."):
            continue
        rest = name[len(linear) + 1 :]
        if "lora_A" in rest:
            return 1 if is_down else None
        if "lora_B" in rest:
            return None if is_down else 0
        if rest.endswith("bias"):
            return None if is_down else 0
        if rest.endswith("weight"):
            return int(is_down != site.transposed)
    return None


def permute_units(owner: nn.Module, site: FFNSite, order_of: Callable[[Any], Tensor]) -> Undo:
    """Move hidden unit `order[i]` to place i, in place; returns the exact inverse.

    Args:
        owner: the module that `site.name` names.
        order_of: owner -> a permutation of the hidden units, int64 [f], whenever it is asked: `reorder` may change it.
    """
    reorder(owner, site, order_of(owner))

    def out(module: nn.Module, state: dict[str, Any], prefix: str, _meta: Any) -> None:
        _translate(state, prefix, site, torch.argsort(order_of(module)))

    def into(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        _translate(state, prefix, site, order_of(module))

    hooks = owner.register_state_dict_post_hook(out), owner.register_load_state_dict_pre_hook(into)

    def undo() -> None:
        for hook in hooks:
            hook.remove()
        reorder(owner, site, torch.argsort(order_of(owner)))

    return undo


@torch.no_grad()
def reorder(owner: nn.Module, site: FFNSite, order: Tensor) -> None:
    """Move hidden unit `order[i]` to place i, an adapter's factors with it."""
    for name, parameter in owner.named_parameters():
        dim = hidden_dim(site, name)
        if dim is not None:
            parameter.copy_(_reordered(parameter, dim, order))


def _translate(state: dict[str, Any], prefix: str, site: FFNSite, order: Tensor) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        dim = hidden_dim(site, key[len(prefix) :])
        tensor = state[key]
        if dim is not None and isinstance(tensor, Tensor) and tensor.ndim > dim and tensor.shape[dim] == len(order):
            state[key] = _reordered(tensor, dim, order)


def _reordered(tensor: Tensor, dim: int, order: Tensor) -> Tensor:
    """tensor.index_select(dim, order). Of a shard, units move between ranks: all of them call this together."""
    full = whole(tensor)
    return as_shard(full.index_select(dim, order.to(full.device)), tensor)
