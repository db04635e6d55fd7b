"""grow(): a new, larger (or smaller) model out of this one, with the map that carries the optimizer state over.

A growth method says, for every parameter of the new model, which old parameter it comes from and where the old entries
stand in it. From that map follow the new weights and the new optimizer state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import describe
from sparsetrain.core.config import MethodConfig, registered_methods
from sparsetrain.surgery.method import method_of


@dataclass(frozen=True)
class Origin:
    """Where a parameter of the new model comes from: `old` name; its entries fill the leading corner of the new one.

    The rest is filled with `fill` (None: the new model's own initial values).
    """

    old: str
    fill: float | None = 0.0


ParameterMap = dict[str, Origin]
"""Name of a new parameter -> where it comes from."""


def grow(model: nn.Module, config: MethodConfig, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Make a new model by a growth method; the old one is left as it is.

    Args:
        model: the model to grow.
        config: a growth config.
        optimizer: the old model's Adam or AdamW. The new parameters take its place in it, and its state is carried
            over: old entries keep their moments, new entries start at zero, `step` is kept.

    Raises:
        ValueError: the config is not of a growth method, or the optimizer's state is not Adam's.
    """
    growth = method_of(config).growth
    if growth is None:
        known = [name for name, kind in registered_methods().items() if method_of(kind).growth is not None]
        raise ValueError(
            f"{config.method!r} changes a model in place; use sparsify(). "
            f"Growth methods: {', '.join(known) or 'none yet'}."
        )
    new, origins = growth.grow(config, model, describe(model))
    old_parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            if name in origins:
                _fill(parameter, old_parameters[origins[name].old], origins[name].fill)
    if optimizer is not None:
        carry_optimizer_state(optimizer, old_parameters, dict(new.named_parameters()), origins)
    return new


def carry_optimizer_state(
    optimizer: torch.optim.Optimizer,
    old_parameters: dict[str, nn.Parameter],
    new_parameters: dict[str, nn.Parameter],
    origins: ParameterMap,
) -> None:
    """Put the new parameters in the old ones' place in `optimizer`, groups and hyper-parameters kept.

    Raises:
        ValueError: a parameter's state holds something other than Adam's `step`, `exp_avg`, `exp_avg_sq`.
    """
    by_old: dict[int, list[tuple[nn.Parameter, Origin]]] = {}
    for name, origin in origins.items():
        by_old.setdefault(id(old_parameters[origin.old]), []).append((new_parameters[name], origin))
    carried: dict[Tensor, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        renewed = []
        for old in group["params"]:
            for new, _ in by_old.get(id(old), []):
                renewed.append(new)
                if old in optimizer.state:
                    carried[new] = _grown_state(optimizer.state[old], new)
        group["params"] = renewed
    optimizer.state.clear()
    optimizer.state.update(carried)  # type: ignore[call-overload]


def _grown_state(state: dict[str, Any], new: nn.Parameter) -> dict[str, Any]:
    unknown = set(state) - {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    if unknown:
        raise ValueError(
            f"the optimizer keeps {sorted(unknown)}; only the state of Adam and AdamW can be carried over."
        )
    grown: dict[str, Any] = {}
    for name, value in state.items():
        if name == "step":
            grown[name] = value.clone() if isinstance(value, Tensor) else value
        else:
            grown[name] = torch.zeros_like(new)
            _fill(grown[name], value, None)
    return grown


def _fill(target: Tensor, source: Tensor, fill: float | None) -> None:
    if fill is not None:
        target.fill_(fill)
    corner = tuple(slice(0, min(t, s)) for t, s in zip(target.shape, source.shape, strict=True))
    target[corner] = source[corner]
