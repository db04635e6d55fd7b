"""What `bench` answers: the outcome of each candidate, and the rates that it measured of the machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sparsetrain.measure.rates import Rates
from sparsetrain.measure.timing import Ratio
from sparsetrain.recipes.finetune import Recipe

BASELINE = "dense: SDPA attention, the same LoRA (or all weights, where a method trains without), fused AdamW"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One candidate. verdict: win, tie or loss of whole steps; refused, with `reason`, if it was not timed.

    against: what the dense step trains, `the same LoRA` or `all weights`. checks: name -> relative L2 distance.
    part: the ratio of the parts that the methods replace, adapters included.
    """

    name: str
    methods: list[dict[str, Any]]
    verdict: str
    reason: str = ""
    against: str = ""
    checks: dict[str, float] = field(default_factory=dict)
    step: Ratio | None = None
    part: Ratio | None = None
    saved_bytes: int | None = None
    dense_saved_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return values | {key: None if (r := values[key]) is None else r.to_dict() for key in ("step", "part")}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """`rates` in the layout that the planner reads, with each timed method's part under `methods`."""

    recipe: Recipe
    layers: int
    model_layers: int
    outcomes: list[Outcome]
    rates: Rates
    machine: dict[str, Any]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as bench.json holds them."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return values | {
            "recipe": self.recipe.model_dump(mode="json"),
            "baseline": BASELINE,
            "outcomes": [outcome.to_dict() for outcome in self.outcomes],
            "rates": self.rates.to_dict(),
        }
