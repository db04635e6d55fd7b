"""What a run is made of before its weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from sparsetrain.hf.data import DataBundle
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.surgery.plan import Plan

R = TypeVar("R", bound=RunRecipe)


@dataclass(frozen=True, kw_only=True)
class Parts(Generic[R]):
    """What a run is made of, checked against each other; the weights are still unread. `plan` is None if dense.

    tokens_per_input: tokens of the model per number that the Trainer counts: below 1 for images, 2 for pairs.
    """

    recipe: R
    device: torch.device
    path: str
    config: Any
    plan: Plan | None
    tokenizer: Any
    bundle: DataBundle
    tokens_per_input: float = 1.0
