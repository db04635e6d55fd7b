"""Reordering an FFN's hidden units in memory, while everything outside the process sees the dense order.

An FFN's output does not depend on the order of its hidden units, so blocks of units can be made contiguous by moving
rows of the first matrices and columns of the last. State dicts are translated on the way out and in: checkpoints,
adapters and exports hold the dense order, and load into plain models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import FFNSite, Undo


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


def permute_units(owner: nn.Module, site: FFNSite, order: Tensor) -> Undo:
    """Move hidden unit `order[i]` to place i, in place; returns the exact inverse.

    Args:
        owner: the module that `site.name` names.
        order: a permutation of the hidden units, int64 [f].
    """
    inverse = torch.argsort(order)
    _reorder(owner, site, order)
    out = owner.register_state_dict_post_hook(lambda m, d, prefix, meta: _translate(d, prefix, site, inverse))
    into = owner.register_load_state_dict_pre_hook(lambda m, d, prefix, *_: _translate(d, prefix, site, order))

    def undo() -> None:
        out.remove()
        into.remove()
        _reorder(owner, site, inverse)

    return undo


@torch.no_grad()
def _reorder(owner: nn.Module, site: FFNSite, order: Tensor) -> None:
    for name, parameter in owner.named_parameters():
        dim = hidden_dim(site, name)
        if dim is not None:
            parameter.copy_(parameter.index_select(dim, order.to(parameter.device)))


def _translate(state: dict[str, Any], prefix: str, site: FFNSite, order: Tensor) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        dim = hidden_dim(site, key[len(prefix) :])
        tensor = state[key]
        if dim is not None and isinstance(tensor, Tensor) and tensor.ndim > dim and tensor.shape[dim] == len(order):
            state[key] = tensor.index_select(dim, order.to(tensor.device))
