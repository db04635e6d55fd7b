"""What a recipe would do, as `--dry-run` says it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

from sparsetrain.core.units import bytes_text, seconds_text
from sparsetrain.measure.ledger import flops_text, size_text
from sparsetrain.measure.schema import StageRecord
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.surgery.plan import Plan


class StageForecast(TypedDict):
    """What a stage will take: FLOPs of the ledger, seconds by the machine's rates, bytes at the peak of a step (of
    parameters, gradients, optimizer and what a step keeps; the libraries come on top).

    static_bytes: parameters, buffers, gradients and optimizer state. saved_bytes: kept for the backward.
    """

    flops: float
    step_s: float
    time_s: float
    peak_bytes: float
    static_bytes: float
    saved_bytes: float


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Sizes in parameters, bytes and tokens; `counts` are of the data. `plan`: None if dense; `resume_step`: if new.

    Sizes are those of the last stage; `stages` tells of each, where there are several, and `forecasts` what it will
    take.
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
    forecasts: list[StageForecast] = field(default_factory=list)
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
            *self._stage_lines(),
            f"Output  {self.recipe.output}",
            *(f"Note    {note}" for note in self.notes),
            *(["", str(self.plan)] if self.plan is not None else []),
        ]

    def _stage_lines(self) -> list[str]:
        found = []
        for i, stage in enumerate(self.stages):
            line = f"Stage   {i + 1} of {len(self.stages)}, {stage['name']}: {size_text(stage)}, steps "
            line += f"{stage['from_step'] + 1:,} to {stage['to_step']:,}"
            if i < len(self.forecasts):
                cost = self.forecasts[i]
                line += f"; {flops_text(cost['flops'])}, about {seconds_text(cost['time_s'])}, peak "
                line += bytes_text(cost["peak_bytes"])
            found.append(line)
        if self.forecasts:
            total = sum(cost["flops"] for cost in self.forecasts)
            dense = self.forecasts[-1]["flops"] * self.steps / max(1, self._last_steps)
            took = sum(cost["time_s"] for cost in self.forecasts)
            found.append(
                f"All     {flops_text(total)}, about {seconds_text(took)}; as many steps of the last model alone: "
                f"{flops_text(dense)}, about {seconds_text(self.forecasts[-1]['step_s'] * self.steps)}. Times are a "
                "roofline of this machine: read their order."
            )
        return found

    @property
    def _last_steps(self) -> int:
        return self.stages[-1]["to_step"] - self.stages[-1]["from_step"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        rows = self.plan.rows() if self.plan is not None else []
        return values | {"recipe": self.recipe.model_dump(mode="json"), "plan": rows}
