"""thin_out(): a model with one block of each kind, and what the whole one would hold."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from torch import nn

from sparsetrain.core.anatomy import Anatomy, known_parts, submodule
from sparsetrain.core.config import MethodConfig
from sparsetrain.measure.memory import StaticMemory, static_memory
from sparsetrain.planner.memory import Layout
from sparsetrain.surgery.site import Site


def thin_out(model: Any, alone: int = 1) -> Layout:
    """Keep the first `alone` blocks and one of each kind of the others; returns which stands for which.

    Blocks that do not lie in one list (a UNet's) read one another's outputs by place: all of them are kept. So
    is all of a model without known blocks (a pair of encoders).

    Raises:
        ValueError: the config derives a layer's kind from its number, so the kept ones would be of other kinds.
    """
    anatomy = known_parts(model)
    if len({block.name.rpartition(".")[0] for block in anatomy.blocks}) != 1:
        return Layout(of_block=tuple(range(len(anatomy.blocks))))
    kinds = _kinds(model, anatomy)
    alone = min(alone, len(kinds))
    kept, place = list(range(alone)), {}
    of_block = list(range(alone))
    for layer in range(alone, len(kinds)):
        if kinds[layer] not in place:
            place[kinds[layer]] = len(kept)
            kept.append(layer)
        of_block.append(place[kinds[layer]])
    parent_name, _, _ = anatomy.blocks[0].name.rpartition(".")
    parent = submodule(model, parent_name)
    blocks = [parent._modules[anatomy.blocks[layer].name.rpartition(".")[2]] for layer in kept]
    parent._modules.clear()
    for i, block in enumerate(blocks):
        parent._modules[str(i)] = block
        for module in block.modules():  # type: ignore[union-attr]
            if hasattr(module, "layer_idx"):  # its place in the key-value cache
                module.layer_idx = i  # type: ignore[assignment]
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(kept)
    if types:
        wanted = [types[layer] for layer in kept]
        with suppress(AttributeError):  # Mamba's and Jamba's follow from the number of layers
            config.layer_types = wanted
        if list(config.layer_types) != wanted:
            raise ValueError(
                f"{config.model_type} says the kind of a layer by its number, so a few of them cannot stand for all: "
                "what it keeps is not known. Plan a model of one kind of layer, or measure a step (`profile`)."
            )
    return Layout(of_block=tuple(of_block))


def _kinds(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """What distinguishes the blocks: modules, shapes, what is trained, methods, windows."""
    config: Any = model.config
    types = getattr(config.get_text_config(), "layer_types", None) or [""] * len(anatomy.blocks)
    kinds = []
    for block, kind in zip(anatomy.blocks, types, strict=True):
        parts: list[Any] = [kind, None if block.attention is None else block.attention.window]
        for name, module in submodule(model, block.name).named_modules():
            params = [
                (n, tuple(p.shape), str(p.dtype), p.requires_grad)
                for n, p in module._parameters.items()
                if p is not None
            ]
            own = module.config if isinstance(getattr(module, "config", None), MethodConfig) else None
            alone = block.layer if isinstance(module, Site) and module.held_models() else None  # they are held once
            parts.append((name, type(module).__name__, params, repr(own), alone))
        kinds.append(json.dumps(parts, default=str))
    return kinds


def whole_memory(model: Any, layout: Layout) -> StaticMemory:
    """Bytes of the whole model, from one with a block of each kind."""
    total = asdict(static_memory(model))
    blocks = [submodule(model, block.name) for block in known_parts(model).blocks]
    for i, block in enumerate(blocks):
        more = layout.of_block.count(i) - 1
        for name, size in asdict(static_memory(block)).items():
            total[name] += more * size
    return StaticMemory(**total)


def trained_parameters(model: Any) -> tuple[list[dict[str, nn.Parameter]], dict[str, nn.Parameter]]:
    """(relative name -> trained parameter of each block, name -> those outside the blocks); tied ones once."""
    blocks = [submodule(model, block.name) for block in known_parts(model).blocks]
    inside = [{name: p for name, p in block.named_parameters() if p.requires_grad} for block in blocks]
    known = {id(p) for params in inside for p in params.values()}
    return inside, {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in known}
