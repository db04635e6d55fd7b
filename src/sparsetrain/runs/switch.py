"""When a run that grows should leave its small model: predicted from two short ordinary runs, and judged afterwards."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sparsetrain.core.files import write_whole
from sparsetrain.core.units import number_text
from sparsetrain.measure.ledger import charged, flops_text, size_of
from sparsetrain.measure.schema import Report as Made
from sparsetrain.measure.switching import best_switch, fitted
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.runs.checkpoints import own_checkpoints
from sparsetrain.runs.comparison import side_recipe
from sparsetrain.runs.events import Event, Report, silent
from sparsetrain.runs.job import JobKind
from sparsetrain.runs.manifest import json_in
from sparsetrain.runs.spans import total_steps
from sparsetrain.surgery.grow import growth_method
from sparsetrain.surgery.method import growth_of

SWITCH, FOUND = "switch", "found.json"
"""Folder of the short runs inside the comparison's, and what they said."""
POINTS, SETTLED = 16, 0.2
"""Evaluations of a short run; the share of it after which its curve is read: before, it is the warm-up's."""


def with_predicted_switch(recipe: RunRecipe, kind: JobKind, report: Report) -> tuple[RunRecipe, dict[str, Any] | None]:
    """(the recipe whose smaller models train for as long as two short runs say, what they said); as it is, and None,
    where the recipe does not ask for it.

    The short runs train the smallest model and the whole one, each from random weights with a constant learning rate.
    What they said is kept in the output, and a continued comparison goes by it.

    Raises:
        ValueError: no method grows a model, or it has no such option; the short runs are too short for a curve.
    """
    steps: int = getattr(recipe, "find_switch", 0)
    if not steps:
        return recipe, None
    growth = growth_of(recipe.configs)
    change = None if growth is None else growth_method(growth).with_small_share
    if growth is None or change is None:
        raise ValueError(f"find_switch={steps} asks when to leave a smaller model, and no method here trains one.")
    place = Path(recipe.output) / SWITCH / FOUND
    said = json_in(place) if recipe.resume else None
    if not isinstance(said, dict) or said.get("steps") != steps:
        said = _predicted(recipe, kind, steps, report)
        write_whole(place, json.dumps(said, indent=1) + "\n")
    report({"event": "note", "text": said["text"]})
    if not said["small_flops"]:
        return recipe, said
    changed = tuple(change(config, said["small_share"]) if config is growth else config for config in recipe.configs)
    return recipe.model_copy(update={"methods": changed}), said


def judged_switch(said: dict[str, Any], made: Made) -> str:
    """How far off the prediction was, once both sides are trained."""
    found = made.get("ledger")
    ended = number_text(found["target_loss"]) if found else "unknown"
    text = f"The ordinary run ended at {ended}, predicted {number_text(said['target'])}. "
    if not found or found["flops_ratio"] is None:
        return text + "The growing run did not come to that loss."
    off = said["flops_ratio"] - found["flops_ratio"]
    return text + (
        f"The growing run took {found['flops_ratio']:.2f} of its FLOPs to that loss, predicted "
        f"{said['flops_ratio']:.2f}: off by {off:+.2f}."
    )


def _predicted(recipe: RunRecipe, kind: JobKind, steps: int, report: Report) -> dict[str, Any]:
    parts = kind.open_parts(recipe, silent)
    models = [grown.model for grown in kind.empty_models(parts.config, recipe)]
    row_tokens = kind.row_tokens(parts.config, recipe)
    sizes = {"small": min(models, key=_numel), "large": max(models, key=_numel)}
    laws, tokens = {}, 0.0
    for name, model in sizes.items():
        short = _short_run(recipe, kind, steps, name, model, report)
        whole: Any = {"name": name, "from_step": 0, "to_step": steps, **size_of(model, row_tokens)}
        told: dict[str, Any] = {name: {**short, "stages": [whole]}}
        run: Any = charged(told)[name]
        points = [point for point in run["evals"] if point["step"] >= max(1, SETTLED * steps)]
        laws[name] = fitted([point["flops"] for point in points], [point["loss"] for point in points])
        tokens = sum(row["tokens"] for row in run["steps"]) / len(run["steps"])
    of_step = {name: tokens * size_of(model, row_tokens)["flops_per_token"] for name, model in sizes.items()}
    all_steps = total_steps(recipe, len(parts.bundle.train))
    switch = best_switch(laws["small"], laws["large"], all_steps * of_step["large"])
    share = switch.small_flops / of_step["small"] / all_steps
    said: dict[str, Any] = {**switch.to_dict(), "steps": steps, "small_share": share}
    said["loss"] = switch.loss if math.isfinite(switch.loss) else None
    errors = {name: law.error for name, law in laws.items()}
    return {**said, "fit_error": errors, "text": _text(said, switch.small_flops, errors)}


def _text(said: dict[str, Any], small_flops: float, errors: dict[str, float]) -> str:
    curves = f"Two runs of {said['steps']} steps (curves fitted to {max(errors.values()):.3f} nats)"
    if not small_flops:
        return f"{curves} predict that a smaller model saves nothing here: the method's own schedule is kept."
    return (
        f"{curves} predict: train the smaller model down to a loss of {number_text(said['loss'])}, "
        f"{flops_text(small_flops)}, which is {said['small_share']:.0%} of the steps; the ordinary run's final "
        f"{number_text(said['target'])} then takes {said['flops_ratio']:.2f} of its FLOPs."
    )


def _short_run(recipe: RunRecipe, kind: JobKind, steps: int, name: str, model: Any, report: Report) -> Any:
    folder = Path(recipe.output) / SWITCH / name
    config = folder.with_name(f"{name}-config")
    config.mkdir(parents=True, exist_ok=True)
    write_whole(config / "config.json", model.config.to_json_string(use_diff=False))
    changes: dict[str, Any] = {"output": str(folder), "model": str(config), "set": {}, "steps": steps, "epochs": None}
    changes |= {"lr_schedule": "constant", "min_lr_ratio": 0.0, "warmup_steps": min(recipe.warmup_steps, steps // 10)}
    changes |= {"eval_every": max(1, steps // POINTS), "save_every": 0, "resume": bool(own_checkpoints(folder))}
    asked = side_recipe(recipe, "dense", {**kind.dense, **changes})

    def beside(event: Event) -> None:
        report({**event, "side": f"{name}, {steps} steps"})

    return kind.train(asked, report=beside, write=False).run


def _numel(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
