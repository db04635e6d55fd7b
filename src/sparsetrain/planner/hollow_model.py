"""A model without weights, converted like the real one, then filled with hollow tensors (`planner.hollow`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core.config import MethodConfig
from sparsetrain.planner.hollow import Hollow
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.surgery.apply import Handle, sparsify
from sparsetrain.surgery.method import blank_state, edits_of
from sparsetrain.surgery.plan import plan
from sparsetrain.surgery.site import Site


def convert_empty(model: Any, recipe: RunRecipe, bf16: bool, first: tuple[MethodConfig, ...] = ()) -> Handle | None:
    """Convert a model on the meta device with blank states.

    Args:
        first: edits that are made before the recipe's own.
    """
    if bf16:
        model.to(torch.bfloat16)
    configs = (*first, *edits_of(recipe.configs))
    if not configs:
        return None
    state = blank_state(plan(model, *configs).edits)
    handle = sparsify(model, *configs, state=state, deploy=getattr(recipe, "deployment", "sparse"))
    _to_meta(model)
    return handle


def _to_meta(model: nn.Module) -> None:
    """What methods added from blank states joins the rest on the meta device."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to("meta")


def fill(model: nn.Module, hollow: Hollow) -> None:
    """Give the meta parameters and buffers hollow storage; ties stay ties, integer buffers become zeros."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the old tensor is kept, or its id could be used again
    with hollow:
        for module in _modules(model):
            for name, old in module._parameters.items():
                if old is not None:
                    if id(old) not in made:
                        new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                        made[id(old)] = (old, nn.Parameter(new, requires_grad=old.requires_grad))
                    module._parameters[name] = made[id(old)][1]  # type: ignore[assignment]
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type == "meta":
                    if id(buffer) not in made:
                        made[id(buffer)] = (buffer, torch.zeros(buffer.shape, dtype=buffer.dtype, device="cpu"))
                    module._buffers[name] = made[id(buffer)][1]


def settle(model: nn.Module, hollow: Hollow) -> None:
    """What modules derive from their weights (packed copies) is made anew from the hollow ones."""
    with hollow:
        for module in _modules(model):
            if isinstance(module, Site):
                module.derive()


def _modules(model: nn.Module) -> list[nn.Module]:
    """The model's modules, and those of the models that sites hold beside it."""
    own = list(model.modules())
    held = [other for module in own if isinstance(module, Site) for other in module.held_models()]
    return own + [module for other in held for module in _modules(other)]
