"""A new model in mid-run: FFNs of half the width first, then of the recipe's, with the optimizer's state carried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from sparsetrain.core.anatomy import Anatomy
from sparsetrain.core.config import MethodConfig
from sparsetrain.surgery.method import Grown, Growth, Method, Origin, Stage, register_method

WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim")
"""What the configs of transformers call the width of an FFN."""


@dataclass(frozen=True, kw_only=True)
class ToyWidening(MethodConfig, method="toy_widening"):
    """New hidden units begin at zero, so the function is the old one."""

    changes_outputs: ClassVar[bool] = False
    grows: ClassVar[bool] = True
    narrow_share: float = 0.5


def stages(config: ToyWidening) -> tuple[Stage, ...]:
    return Stage(name="narrow", share=config.narrow_share), Stage(name="wide", share=1 - config.narrow_share)


def resized(model: Any, factor: float) -> nn.Module:
    values = model.config.to_dict()
    name = next(name for name in WIDTHS if values.get(name))
    config = type(model.config).from_dict({**values, name: int(values[name] * factor)})
    config._attn_implementation = model.config._attn_implementation
    return type(model)(config).to(model.device)


def enter(config: ToyWidening, stage: int, model: nn.Module, anatomy: Anatomy, kept: Any) -> Grown:
    new = resized(model, 0.5 if stage == 0 else 2.0)
    return Grown(model=new, origins={name: Origin(name) for name, _ in model.named_parameters()})


register_method(ToyWidening, Method(growth=Growth(stages=stages, enter=enter)))
