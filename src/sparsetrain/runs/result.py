"""What a run did, as its result.json and its report say it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsetrain.measure.report import build_report
from sparsetrain.measure.schema import Run
from sparsetrain.recipes.run import RunRecipe


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run did.

    run: quality by stage, steps, memory, as `measure.schema.Run`.
    saved: the folder of the adapter or model.
    data_order: a hash of the rows in the order they were trained on; None for a continued run, and for one of several
        stages, at whose ends the Trainer has read ahead.
    """

    recipe: RunRecipe
    saved: Path
    run: Run
    data: str
    plan: list[dict[str, Any]]
    sparsity: dict[str, Any]
    notes: list[str]
    parameters: int
    trainable_parameters: int
    data_order: str | None
    resumed_from: int | None = None
    machine: dict[str, Any] = field(default_factory=dict)

    title: str = ""

    @property
    def kind(self) -> str:
        """`sparse` or `dense`."""
        return "sparse" if self.recipe.methods else "dense"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in result.json."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return values | {"recipe": self.recipe.model_dump(mode="json"), "saved": str(self.saved), "kind": self.kind}


def run_report(result: Result) -> Any:
    """The `measure` report of a single run."""
    return build_report(
        title=result.title,
        runs={result.kind: result.run},
        recipe=result.recipe.model_dump(mode="json"),
        machine=result.machine,
        plan=result.plan,
        notes=[result.data, *result.notes],
    )
