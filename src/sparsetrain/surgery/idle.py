"""Gradients of zeros for parameters of ours that a step leaves alone, where ranks reduce their gradients together.

DDP without `find_unused_parameters` waits for a gradient of every parameter, and a codebook between its updates or a
router while everything runs dense has none. So the backward gives it zeros. They are taken away again before the
optimizer's step, which would decay the parameter and move it by its momentum: with and without ranks, an optimizer
sees the same gradients. The zeros are written, not multiplied, so that a NaN elsewhere stays elsewhere. A parameter is
known by its place in a module: `fully_shard` puts another tensor there for a forward than the optimizer has.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

Place = tuple[nn.Module, str]
"""A parameter: the module that holds it, and its name there."""
_IDLE: WeakKeyDictionary[nn.Module, dict[str, bool]] = WeakKeyDictionary()
"""Module -> its parameters' names -> whether they were idle in every forward since the optimizer's last step."""


class _AttachZeros(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.likes = [(tuple(p.shape), p.dtype, p.device) for p in parameters]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return (*grads, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.likes))


def places_of(module: nn.Module) -> list[Place]:
    return [(inside, name) for inside in module.modules() for name, p in inside._parameters.items() if p is not None]


def attach_zeros(out: Any, places: Iterable[Place], *, idle: bool = True) -> Any:
    """`out` (a tensor, or a tuple that begins with one), whose backward gives the parameters gradients of zeros.

    Itself outside of training, and where no process group runs.

    Args:
        idle: no rank gives them another gradient in this step, so the optimizer is to see none. False: another rank,
            or another part of the batch, may.
    """
    trained = [(module, name) for module, name in places if _at(module, name).requires_grad]
    if not (trained and torch.is_grad_enabled() and _ranks_run()):
        return out
    note(trained, idle=idle)
    first = out[0] if isinstance(out, (tuple, list)) else out
    with_zeros: Any = _AttachZeros.apply(first, *(_at(module, name) for module, name in trained))
    return type(out)((with_zeros, *out[1:])) if isinstance(out, (tuple, list)) else with_zeros


def _note(places: Iterable[Place], *, idle: bool) -> None:
    """Say whether parameters are idle in the present forward."""
    if _ranks_run():
        _begin()
        for module, name in places:
            names = _IDLE.setdefault(module, {})
            names[name] = idle and names.get(name, True)


note: Any = torch.compiler.disable(_note)


def _at(module: nn.Module, name: str) -> Tensor:
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter


def _ranks_run() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@cache
def _begin() -> None:
    """Register with torch, once a process."""

    def before_step(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        noted = {id(_at(module, name)): (names, name) for module, names in _IDLE.items() for name in names}
        for group in optimizer.param_groups if noted else ():
            for parameter in group["params"]:
                names, name = noted.get(id(parameter), ({}, ""))
                if names.pop(name, False):
                    parameter.grad = None

    register_optimizer_step_pre_hook(before_step)
