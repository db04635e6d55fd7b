"""profile_recipe(): a training step of a recipe measured by component, beside dense LoRA if asked.

Each side runs in a fresh process, so that its resident peak is its own: pages that an allocator keeps from earlier work
would hide the difference.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsetrain.hf.data.random_tokens import RANDOM
from sparsetrain.hf.study.training_step import build_step, dense_twin, open_measured_parts
from sparsetrain.hf.train.dtype import with_dtype
from sparsetrain.measure.machine import describe_machine
from sparsetrain.measure.memory import peak_memory, release_free_pages
from sparsetrain.measure.step_profile import Profile, profile
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.runs.events import Event, Report, silent
from sparsetrain.runs.sides import Line, Side, SideDied


@dataclass(frozen=True, kw_only=True)
class Profiled:
    """sides: `dense` or `sparse`, or both -> a `Profile` as plain values, with `resident_before` (bytes of the process
    when the model stood ready) and `plan`."""

    recipe: Recipe
    sides: dict[str, dict[str, Any]]
    machine: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "sides": self.sides,
            "machine": self.machine,
            "notes": self.notes,
        }


def profile_recipe(recipe: Recipe, *, steps: int = 1, compare: bool = False, report: Report = silent) -> Profiled:
    """Profile one training step of a recipe (the median of `steps` for times).

    Args:
        recipe: its `data` may be `RANDOM`: rows of random tokens then, and a note that says so.
        steps: timed steps.
        compare: also profile the dense model with the same LoRA, after the recipe and in a process of its own.
        report: told which side runs, and notes.

    Raises:
        ValueError, PlanError: the recipe does not fit the machine, the model or the data.
        MemoryError: a side ran out of memory.
        RuntimeError: a side died otherwise; its last words are in the message.
    """
    recipe = with_dtype(recipe, report)
    wanted = {"sparse" if recipe.methods else "dense": recipe}
    if compare and not recipe.methods:
        raise ValueError("compare=dense needs something to compare with dense: give --method or --preset.")
    if compare:
        wanted["dense"] = dense_twin(recipe)
    notes, sides = [], {}
    if recipe.data == RANDOM:
        notes.append(
            "No --data was given, so rows of random tokens were used: time and memory are those of full rows; "
            "how tokens spread over a router's blocks may differ with your text."
        )
    for name, each in wanted.items():
        report({"event": "note", "text": f"profiling the {name} step of {each.model} at {each.seq_len:,} tokens"})
        sides[name] = _in_own_process(each, recipe if compare else each, steps)
        notes += [f"{name}: {note}" for note in sides[name].pop("notes")]
    if len(sides) > 1:
        notes.append("The sides ran one after the other; for a speed-up, timed in turns, use sparsetrain bench.")
    return Profiled(recipe=recipe, sides=sides, machine=describe_machine().to_dict(), notes=notes)


def profile_side(recipe: Recipe, like: Recipe, steps: int) -> dict[str, Any]:
    """One side, measured in this process."""
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    notes: list[str] = []

    def note(event: Event) -> None:
        if event["event"] == "note":
            notes.append(event["text"])

    parts = open_measured_parts(recipe, note, like)
    step = build_step(parts, note)
    release_free_pages()
    before = peak_memory(parts.device).rss_bytes
    found: Profile = profile(step.model, step, steps=steps, device=parts.device)
    rows = [] if parts.plan is None else parts.plan.rows()
    return found.to_dict() | {
        "resident_before": before,
        "plan": rows,
        "notes": [parts.bundle.description, *notes],
        "tokens_per_step": recipe.seq_len * recipe.batch_size * recipe.grad_accum,
    }


def _in_own_process(recipe: Recipe, like: Recipe, steps: int) -> dict[str, Any]:
    job = {"recipe": recipe.model_dump(mode="json"), "like": like.model_dump(mode="json"), "steps": steps}
    with Side(f"{__name__}:run_side") as side:
        try:
            return side.result(job)
        except SideDied as error:
            if error.code != -signal.SIGKILL:
                raise
            what = f"the process of {recipe.model} at {recipe.seq_len:,} tokens"
            raise MemoryError(f"{what} was killed by the system") from None


def run_side(job: dict[str, Any], _line: Line) -> dict[str, Any]:
    """`profile_side` in a side's process."""
    return profile_side(Recipe(**job["recipe"]), Recipe(**job["like"]), job["steps"])
