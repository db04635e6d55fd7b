"""Models under PyTorch's `fully_shard`: whole weights of shards, and gradients where no name of the model leads.

Between two steps a parameter is this rank's shard, a DTensor. Between a forward and its backward the outermost module
holds whole weights under the same names, and the gradients of earlier passes hang on the shards, which no public name
reaches then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed import is_available

from sparsetrain.core.modes import modules_of


def is_shard(x: Tensor) -> bool:
    """Whether this is a rank's part of a tensor."""
    return is_available() and hasattr(x, "full_tensor")


def whole(x: Tensor) -> Tensor:
    """A tensor in full, gathered where it is a shard; then every rank calls this."""
    return x.full_tensor() if is_shard(x) else x  # type: ignore[operator]


def as_shard(x: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank holds in full, cut as `like` is; x itself where that is whole."""
    if not is_shard(like):
        return x
    from torch.distributed.tensor import distribute_tensor  # not in every build of torch

    shard: Any = like
    return distribute_tensor(x, shard.device_mesh, shard.placements, src_data_rank=None)


def fill(into: Tensor, values: Tensor) -> None:
    """Write a tensor that every rank holds in full, each its part where `into` is a shard."""
    if is_shard(into):
        into.to_local().copy_(as_shard(values, into).to_local())  # type: ignore[operator]
    else:
        into.copy_(values)


def gradients_of(model: nn.Module, more: Iterable[Tensor] = ()) -> list[Tensor]:
    """The gradients that are there, of a model's parameters and of more tensors; shards are DTensors.

    Raises:
        RuntimeError: this version of torch keeps shards elsewhere.
    """
    modules = modules_of(model)
    sharded = list(_sharded(modules))
    own = (parameter for module in modules for parameter in module._parameters.values() if parameter is not None)
    holders = dict.fromkeys([*own, *more, *_behind(sharded)])
    found = [holder.grad for holder in holders if holder.grad is not None]
    return found + [grad for param in sharded if (grad := param.unsharded_accumulated_grad) is not None]


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on this module."""
    return hasattr(type(module), "_get_fsdp_state")  # what a module itself lacks takes it 3 us to say


def _behind(sharded: Iterable[Any]) -> Iterator[Tensor]:
    """Both forms of every sharded parameter: the gradient hangs on one of them."""
    for param in sharded:
        yield param.sharded_param
        if hasattr(param, "_unsharded_param"):  # since the first time that it was gathered
            yield param._unsharded_param


def _sharded(modules: Iterable[nn.Module]) -> Iterator[Any]:
    if not any(hasattr(kind, "_get_fsdp_state") for kind in set(map(type, modules))):
        return
    for module in modules:
        if not is_sharded(module):
            continue
        state = module._get_fsdp_state()  # type: ignore[operator]
        try:  # several groups of a module since torch 2.13; one before
            groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
            yield from [param for group in groups if group is not None for param in group.fsdp_params]
        except AttributeError as error:
            raise RuntimeError(
                f"fully_shard of this torch keeps its shards in another place ({error}), so gradients of earlier "
                "passes cannot be found. Give one pass a step, train with DDP, or use torch 2.11 to 2.13."
            ) from None
