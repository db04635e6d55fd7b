"""Which steps of a run each of its stages trains."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sparsetrain.measure.schema import ModelSize, StageRecord
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.surgery.method import Stage, stage_end

ONE_STAGE = (Stage(name="training", share=1.0),)


@dataclass(frozen=True, kw_only=True)
class Span:
    """The steps of one stage, as the run counts them: those after `first`, up to `last`, of `total`.

    rewound: the steps that were done when the learning rate went back to the end of its warm-up; None if it never did.
    """

    stage: Stage
    index: int
    of: int
    first: int
    last: int
    total: int
    rewound: int | None = None

    @property
    def steps(self) -> int:
        return self.last - self.first

    def record(self, size: ModelSize) -> StageRecord:
        """For the run's records; size: of the model that it trains."""
        return {"name": self.stage.name, "from_step": self.first, "to_step": self.last, **size}

    def place(self, step: int) -> dict[str, Any]:
        """Where a checkpoint of this stage is in the run; nothing to say where there is one stage."""
        return {} if self.of == 1 else {"stage": self.index, "stage_step": step - self.first}


def total_steps(recipe: RunRecipe, num_rows: int) -> int:
    """Optimizer steps of a run over that many training rows."""
    per_epoch = math.ceil(num_rows / (recipe.batch_size * recipe.grad_accum))
    return recipe.steps or math.ceil((recipe.epochs or 1) * per_epoch)


def spans(stages: tuple[Stage, ...], recipe: RunRecipe, num_rows: int) -> tuple[Span, ...]:
    """The steps of each stage.

    Raises:
        ValueError: shares do not add up to 1; a stage gets no step, or none after its warm-up.
    """
    total = total_steps(recipe, num_rows)
    shares = ", ".join(f"{stage.name} {stage.share:g}" for stage in stages)
    if abs(sum(stage.share for stage in stages) - 1) > 1e-6:
        raise ValueError(f"the shares of the stages ({shares}) do not add up to 1.")
    ends = [stage_end(stages, i, total) for i in range(len(stages))]
    rewinds = [first if stage.rewind_lr else None for stage, first in zip(stages, [0, *ends], strict=False)]
    found = tuple(
        Span(
            stage=stage,
            index=i,
            of=len(stages),
            first=first,
            last=last,
            total=total,
            rewound=next((at for at in reversed(rewinds[: i + 1]) if at is not None), None),
        )
        for i, (stage, first, last) in enumerate(zip(stages, [0, *ends], ends, strict=False))
    )
    for span in found:
        own = recipe.warmup_steps if span.stage.warmup_steps is None else span.stage.warmup_steps
        least = own if span.stage.restart_lr else 0
        if span.steps <= least:
            raise ValueError(
                f"stage {span.stage.name!r} gets {span.steps} of steps={total} and needs more than {least} (stages: "
                f"{shares}). Train longer, or change the shares."
            )
    return found
