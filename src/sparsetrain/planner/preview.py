"""What a recipe would do, as `--dry-run` says it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sparsetrain.measure.schema import StageRecord
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.surgery.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Sizes in parameters, bytes and tokens; `counts` are of the data. `plan`: None if dense; `resume_step`: if new.

    Sizes are those of the last stage; `stages` tells of each, where there are several.
    """

    recipe: RunRecipe
    plan: Plan | None
    data: str
    parameters: int
    trainable_parameters: int
    weight_bytes: int
    optimizer_bytes: int
    steps: int
    tokens_per_step: int
    device: str
    counts: dict[str, int]
    resume_step: int | None = None
    stages: list[StageRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What a person reads."""
        share = self.trainable_parameters / self.parameters
        how = "all weights" if self.recipe.trains_all else "what the method adds"
        if rank := getattr(self.recipe, "lora_r", 0):
            how = f"LoRA of rank {rank}"
        begin = "" if self.resume_step is None else f", from step {self.resume_step}"
        return [
            f"Model   {self.recipe.model}: {self.parameters:,} parameters, {self.weight_bytes / 2**20:,.0f} MiB",
            f"Trained {how}: {self.trainable_parameters:,} parameters ({share:.2%}), "
            f"{self.optimizer_bytes / 2**20:,.0f} MiB of optimizer state",
            f"Data    {self.data}",
            f"Length  {self.steps:,} steps of {self.tokens_per_step:,} tokens{begin}, on {self.device}",
            *(
                f"Stage   {i + 1} of {len(self.stages)}, {stage['name']}: {stage['parameters']:,} parameters, steps "
                f"{stage['from_step'] + 1:,} to {stage['to_step']:,}"
                for i, stage in enumerate(self.stages)
            ),
            f"Output  {self.recipe.output}",
            *(f"Note    {note}" for note in self.notes),
            *(["", str(self.plan)] if self.plan is not None else []),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        rows = self.plan.rows() if self.plan is not None else []
        return values | {"recipe": self.recipe.model_dump(mode="json"), "plan": rows}
