"""After a comparison: dense with gradient checkpointing timed beside dense, and more pairs of steps where those of the
run left it undecided who is faster.

All sides are processes of their own that begin anew, so that each has its own peak of memory; what they train is
thrown away.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsetrain.core.units import joined
from sparsetrain.measure.schema import Checkpointing
from sparsetrain.measure.timing import LOOKS, ratio
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.runs.events import Report, silent
from sparsetrain.runs.layout import DENSE, SPARSE
from sparsetrain.runs.turns import time_in_turns
from sparsetrain.surgery.method import growth_of

CHECKPOINTING = "dense + checkpointing"
PAIRS = 3
"""Timed pairs of dense and dense + checkpointing: how much slower it is, roughly; its peak is the same in each."""
LOOK = 6
"""Further pairs of dense and sparse before their interval is looked at again."""
ENOUGH = 30
"""Pairs of a run after which a few more would not narrow the interval."""
LEAST_S, SHARE = 60.0, 0.25
"""What all this may take: a minute of steps, or a quarter of the time that both runs have trained."""

Pairs = tuple[list[float], list[float]]
"""Seconds of dense steps, and of the sparse steps beside them."""


@dataclass(frozen=True, kw_only=True)
class Extra:
    """pairs: further pairs. checkpointing: None where it was not measured; `notes` then say why."""

    pairs: Pairs = ([], [])
    checkpointing: Checkpointing | None = None
    notes: list[str] = field(default_factory=list)


def undecided(recipe: RunRecipe, pairs: Pairs) -> bool:
    """Whether further pairs may tell who is faster. A model that grows has no step that stands for all."""
    if len(pairs[0]) >= ENOUGH or growth_of(recipe.configs) is not None:
        return False
    return len(pairs[0]) < 3 or not ratio(*pairs).decided


def extra_turns(
    work: str,
    like: dict[str, Any],
    recipe: RunRecipe,
    dense: dict[str, Any],
    pairs: Pairs,
    trained_s: float,
    report: Report,
) -> Extra:
    """Time what a comparison still lacks; a failure costs the comparison nothing, and is a note.

    Args:
        work: as of `train_in_turns`. like: `job` and `like` of its jobs.
        dense: recipe keys that the dense side has in place of the recipe's own.
        pairs: of the run.
        trained_s: seconds that both sides have trained.
    """
    open_question = undecided(recipe, pairs)
    # the first side sets up first
    names = [SPARSE] if open_question else []
    names += [CHECKPOINTING] if recipe.gradient_checkpointing == "none" else []
    if not names:
        return Extra()
    report({"event": "note", "text": f"timing {joined(names)} beside dense, for a few more steps"})
    try:
        with tempfile.TemporaryDirectory(prefix="sparsetrain-") as folder:
            recipes = {name: timed_recipe(recipe, name, dense, Path(folder)) for name in (*names, DENSE)}
            jobs = {name: {**like, "recipe": each.model_dump(mode="json")} for name, each in recipes.items()}
            seconds = max(LEAST_S, SHARE * trained_s)
            found = time_in_turns(work, jobs, silent, _wanted(pairs, open_question, names, seconds))
    except Exception as error:  # out of memory, a model without checkpointing: the comparison itself is done
        reason = str(error).partition("\n")[0]
        return Extra(notes=[f"{joined(names)} could not be timed beside dense: {reason}"])
    more = tuple(map(list, zip(*zip(found[DENSE]["seconds"], found[SPARSE]["seconds"])))) if open_question else ()
    beside = _checkpointing(found) if CHECKPOINTING in names else None
    notes = [] if beside or CHECKPOINTING not in names else [f"There was no time for a step of {CHECKPOINTING}."]
    return Extra(pairs=more or ([], []), checkpointing=beside, notes=notes)  # type: ignore[arg-type]


def timed_recipe(recipe: RunRecipe, name: str, dense: dict[str, Any], folder: Path) -> RunRecipe:
    """The recipe of a side that is only timed: the ordinary steps, from the start, and as few other things as can be.

    The sparse side is as in the middle of its run: past any warm-up, in no dense phase.
    """
    changes: dict[str, Any] = {"output": str(folder / name), "compare": "none", "resume": False}
    changes |= {"eval_tokens": 1, "eval_every": 0, "save_every": 0}
    changes |= {"steps": LOOKS * LOOK, "epochs": None, "warmup_steps": 0}
    if name == SPARSE:
        changes["methods"] = tuple(config.sparse_at_once() for config in recipe.configs)
        keys = ["distill_steps"] if "distill_steps" in type(recipe).model_fields else []
        keys += ["dense_first", "dense_last"] if getattr(recipe, "deployment", "sparse") != "sparse" else []
        changes |= dict.fromkeys(keys, 0)
    else:
        changes |= {"methods": (), **dense}
    if name == CHECKPOINTING:
        changes["gradient_checkpointing"] = "non-reentrant"
    return recipe.model_copy(update=changes)


def _wanted(
    pairs: Pairs, open_question: bool, names: list[str], seconds: float
) -> Callable[[dict[str, list[float]]], set[str]]:
    """The sides to go on with: until three pairs, until it is decided, or until the time is over."""
    began: list[float] = []

    def wanted(found: dict[str, list[float]]) -> set[str]:
        began.append(time.monotonic())
        over = began[-1] - began[0] > seconds
        going = {CHECKPOINTING} if CHECKPOINTING in names and len(found[CHECKPOINTING]) < PAIRS else set[str]()
        if open_question:
            more = len(found[SPARSE])
            look = more > 0 and more % LOOK == 0
            together = ratio(pairs[0] + found[DENSE], pairs[1] + found[SPARSE]) if look else None
            if more < (LOOKS - 1) * LOOK and not (together is not None and together.decided):
                going.add(SPARSE)
        return going | {DENSE} if going and not over else set()

    return wanted


def _checkpointing(found: dict[str, dict[str, Any]]) -> Checkpointing | None:
    own, dense = found[CHECKPOINTING], found[DENSE]["seconds"]
    slower = [c / max(d, 1e-12) for d, c in zip(dense, own["seconds"])]
    if not slower:
        return None
    last = len(slower) - 1  # dense may have gone on, beside sparse
    peaks, dense_peaks = own["peaks"][last], found[DENSE]["peaks"][last]
    return {
        "time_ratio": statistics.median(slower),
        "num_pairs": len(slower),
        "peak_rss_bytes": peaks["peak_rss_bytes"],
        "peak_gpu_bytes": peaks["peak_gpu_bytes"],
        "dense_rss_bytes": dense_peaks["peak_rss_bytes"],
        "dense_gpu_bytes": dense_peaks["peak_gpu_bytes"],
    }
