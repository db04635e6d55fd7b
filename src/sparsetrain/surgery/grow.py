"""grow(): a new, larger (or smaller) model out of this one, with the optimizer state carried over.

A growth method says, for every parameter of the new model, which old parameters it comes from and how (`Origin`). From
that follow the new weights and the new optimizer state. `grow` is one step of it for one's own loop; a run goes through
all of a method's stages by the same parts (`hf.train.stages`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import describe
from sparsetrain.core.config import MethodConfig, registered_methods
from sparsetrain.surgery.apply import sparsify
from sparsetrain.surgery.method import Grown, Growth, Origin, Weights, method_of
from sparsetrain.surgery.record import handles_of

ADAM_STATE = frozenset({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"})
"""What an optimizer may hold of a parameter if it is to be carried over."""


def grow(
    model: nn.Module,
    config: MethodConfig,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    stage: int = 1,
    kept: MutableMapping[str, Weights] | None = None,
) -> nn.Module:
    """Make the model of a growth method's next stage; the old one is left as it is.

    Args:
        model: the model to grow, as the stage before has trained it.
        config: a growth config.
        optimizer: the old model's Adam or AdamW. The new parameters take its place in it, and its state is carried
            over as the method says. Parameters that come from none join the first group.
        stage: the stage that begins; stage 0 may shrink a freshly made model.
        kept: weights that the method keeps from one stage for a later one; give the same dict to each call.

    What the stage before had installed in the model is merged first; what the new stage carries is installed, and
    driven by `handles_of(model)[0].step(step, total_steps)`.

    Raises:
        ValueError: the config is not of a growth method, the optimizer's state is not Adam's, or what the model carries
            cannot be merged (it is still growing).
    """
    for handle in handles_of(model):
        handle.merge()
    grown = enter(model, config, stage, {} if kept is None else kept)
    if optimizer is not None and grown.model is not model:
        carry_optimizer(optimizer, model, grown)
    if grown.edits:
        sparsify(grown.model, *grown.edits)
    return grown.model


def growth_method(config: MethodConfig) -> Growth:
    """The growth of a config's method.

    Raises:
        ValueError: the method edits a model.
    """
    growth = method_of(config).growth
    if growth is None:
        known = [name for name, kind in registered_methods().items() if method_of(kind).growth is not None]
        raise ValueError(
            f"{config.method!r} changes a model in place; use sparsify(). "
            f"Growth methods: {', '.join(known) or 'none yet'}."
        )
    return growth


def enter(
    model: nn.Module,
    config: MethodConfig,
    stage: int,
    kept: MutableMapping[str, Weights],
    seed: int | None = None,
) -> Grown:
    """The model of a stage with its weights, on the old one's device, and where its parameters came from.

    Args:
        seed: of what the method draws; None leaves torch's generator as it is.
    """
    growth = growth_method(config)
    before = torch.random.get_rng_state()
    try:
        if seed is not None:
            torch.manual_seed(seed + stage)
        grown = growth.enter(config, stage, model, describe(model), kept)
    finally:
        if seed is not None:
            torch.random.set_rng_state(before)
    if grown.model is model:
        return replace(grown, origins={name: Origin(name) for name, _ in model.named_parameters()})
    fill(grown, model)
    return grown


def fill(grown: Grown, model: nn.Module) -> nn.Module:
    """Give a new model, on the old one's device, the weights that come from the old one."""
    old = dict(model.named_parameters())
    grown.model.to(next(iter(old.values())).device)
    with torch.no_grad():
        for name, parameter in grown.model.named_parameters():
            if (origin := grown.origins.get(name)) is not None:
                _write(parameter, origin, [old[source] for source in origin.olds], origin.fill)
    return grown.model


def models_of_stages(model: nn.Module, config: MethodConfig, seed: int | None = None) -> Iterator[nn.Module]:
    """The model of each stage, as `grown_in_stages`."""
    return (grown.model for grown in grown_in_stages(model, config, seed))


def grown_in_stages(model: nn.Module, config: MethodConfig, seed: int | None = None) -> Iterator[Grown]:
    """What each stage begins with, as far as shapes go: nothing is trained between.

    Args:
        model: the recipe's own; on the meta device, so are all.
    """
    kept: dict[str, Weights] = {}
    device = next(model.parameters()).device
    for stage in range(len(growth_method(config).stages(config))):
        with device if device.type == "meta" else torch.device("cpu"):
            grown = enter(model, config, stage, kept, seed)
        yield grown
        model = grown.model


def carry_optimizer(optimizer: torch.optim.Optimizer, old: nn.Module, grown: Grown) -> None:
    """Put a new model's parameters in the old one's place in `optimizer`; groups and hyper-parameters are kept.

    Raises:
        ValueError: a parameter's state holds something other than Adam's.
    """
    names = {id(parameter): name for name, parameter in old.named_parameters()}
    groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    new = dict(grown.model.named_parameters())
    first = {name: grown.origins[name].olds[0] for name in new if name in grown.origins}
    renewed = [[name for name in new if first.get(name) in group] for group in groups]
    renewed[0] += [name for name in new if name not in first]
    state = carried_state(optimizer.state_dict(), groups, renewed, grown)
    optimizer.state.clear()
    for group, members in zip(optimizer.param_groups, renewed, strict=True):
        group["params"] = [new[name] for name in members]
    optimizer.load_state_dict(state)


def carried_state(
    state: Mapping[str, Any], old_names: list[list[str]], new_names: list[list[str]], grown: Grown
) -> dict[str, Any]:
    """An optimizer's state dict for the new model.

    Args:
        state: the old optimizer's state dict.
        old_names, new_names: parameters of each group, in the optimizers' order; as many groups in both.

    Raises:
        ValueError: a parameter's state holds something other than Adam's.
    """
    old = {name: place for place, name in enumerate(chain.from_iterable(old_names))}
    new = dict(grown.model.named_parameters())
    entries: dict[int, dict[str, Any]] = {}
    for place, name in enumerate(chain.from_iterable(new_names)):
        origin = grown.origins.get(name) if grown.optimizer == "carry" else None
        sources = [state["state"].get(old.get(source)) for source in origin.olds] if origin is not None else []
        if origin is not None and origin.carry and all(sources):
            entries[place] = _grown_state(origin, sources, new[name])
    groups, begin = [], 0
    for group, members in zip(state["param_groups"], new_names, strict=True):
        groups.append({**group, "params": list(range(begin, begin + len(members)))})
        begin += len(members)
    return {"state": entries, "param_groups": groups}


def _grown_state(origin: Origin, sources: list[dict[str, Any]], new: nn.Parameter) -> dict[str, Any]:
    if unknown := {key for source in sources for key in source} - ADAM_STATE:
        raise ValueError(
            f"the optimizer keeps {sorted(unknown)}; only the state of Adam and AdamW can be carried over."
        )
    grown: dict[str, Any] = {}
    for key, value in sources[0].items():
        if key == "step":
            grown[key] = value.clone() if isinstance(value, Tensor) else value
        else:
            grown[key] = torch.zeros_like(new, dtype=value.dtype, device=value.device, requires_grad=False)
            _write(grown[key], origin, [source[key] for source in sources], None)
    return grown


def _write(target: Tensor, origin: Origin, sources: list[Tensor], fill: float | None) -> None:
    if origin.map is not None:
        mapped = origin.map(*sources)
        assert mapped.shape == target.shape, f"{origin.old} was mapped to {mapped.shape}, not {target.shape}"
        target.copy_(mapped)
        return
    if fill is not None:
        target.fill_(fill)
    (source,) = sources
    if origin.parts is not None:
        dim, count = origin.parts
        target, source = target.unflatten(dim, (count, -1)), source.unflatten(dim, (count, -1))
    corner = tuple(slice(0, min(t, s)) for t, s in zip(target.shape, source.shape, strict=True))
    target[corner] = source[corner]
