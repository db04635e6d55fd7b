"""Which layers of a block the two passes note, found anew in every step: adapters come, go and are switched off.

A layer that runs PyTorch's own forward is noted where it stands, by a forward of ours on it. A TorchFunctionMode sees
what a block calls besides (OPT's and Bloom's functional dropout), but it is asked for every operation and every
attribute of a tensor in both passes, some 450 times a Llama's block; so it is there until a block has once run
without need of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from torch import nn

from sparsetrain.surgery.lora import LinearParts, plain_lora

Adapters = Mapping[nn.Module, LinearParts]
"""Linears with their LoRA, as `surgery.lora.plain_lora` finds them."""


class Layers(NamedTuple):
    """The layers of a block that are noted.

    Attributes:
        adapters: linears with LoRA.
        linears: the others, GPT-2's Conv1D among them.
        dropouts: those of modules, active or not.
    """

    adapters: Adapters
    linears: list[nn.Module]
    dropouts: list[nn.Module]

    @property
    def all(self) -> list[nn.Module]:
        return [*self.adapters, *self.linears, *self.dropouts]


def layers_of(block: nn.Module) -> Layers:
    """The layers of a block as it is now."""
    adapters = plain_lora(block)
    linears, dropouts, waiting = list[nn.Module](), list[nn.Module](), [block]
    while waiting:
        module = waiting.pop()
        kind = kind_of(type(module))
        if kind is None:
            waiting += [child for child in module._modules.values() if child is not None and child not in adapters]
        elif "forward" not in vars(module) and module._compiled_call_impl is None:
            (dropouts if kind == "dropout" else linears).append(module)
    return Layers(adapters, linears, dropouts)


@cache
def kind_of(kind: type) -> str | None:
    """linear, addmm (GPT-2's Conv1D) or dropout, for a class that computes as PyTorch's or transformers' own does."""
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return "addmm"
    for known, name in ((nn.Linear, "linear"), (nn.Dropout, "dropout")):
        if issubclass(kind, known) and kind.forward is known.forward:
            return name
    return None
