"""How much each layer loses when a recipe's methods convert it alone, and which layers fit a quality budget."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from sparsetrain.core.config import plain_values
from sparsetrain.hf.train import assemble
from sparsetrain.hf.train.dtype import with_dtype
from sparsetrain.hf.train.parts import Parts
from sparsetrain.hf.train.rows import calibration_batches
from sparsetrain.hf.train.tasks import training_loss
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.runs.events import Report, silent
from sparsetrain.surgery.plan import plan
from sparsetrain.surgery.sensitivity import choose_layers, layer_losses

INTERACTION = 1.3
"""Layers converted together lose this times the sum of their losses alone: 0.360 nats against 0.274 for all thirty of
SmolLM2-135M at 5/8 of the units, 0.488 against 0.437 at half."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What was measured, and what was chosen.

    rows: one a method and layer: method, layer, nats, mflop_saved (forward, per token, at the recipe's length), kept.
    recipe: the recipe with `layers` filled in; None without a budget.
    predicted: perplexity of the chosen layers together as a multiple of the dense one; None without a budget.
    """

    rows: list[dict[str, Any]]
    recipe: Recipe | None
    predicted: float | None
    tokens: int


def sensitivity(recipe: Recipe, *, budget: float | None = None, report: Report = silent) -> Sensitivity:
    """Measure every layer that the recipe's methods may take; with a budget, choose among them.

    Args:
        recipe: model, data, methods; `eval_tokens` held-out tokens are measured on.
        budget: allowed perplexity before training, as a multiple of the dense one: 1.25 loses a quarter.

    Raises:
        ValueError: a budget below 1 or one that no layer fits; a recipe without methods; a method without a start to
            measure; as `finetune` for model and data.
    """
    if budget is not None and not budget > 1:
        raise ValueError(f"budget={budget} allows no loss. Give a multiple of the dense perplexity above 1, e.g. 1.25.")
    if not recipe.configs:
        raise ValueError("the recipe has no method, so there is no layer to try. Give --method or --preset.")
    recipe = with_dtype(recipe, report)
    parts = assemble.open_parts(recipe, report)
    model, _ = assemble.load_model(parts)
    held_out = _held_out(parts)
    rows: list[dict[str, Any]] = []
    for place, config in enumerate(recipe.configs):
        losses = layer_losses(
            model,
            config,
            held_out,
            calibration=calibration_batches(parts),
            seed=recipe.seed,
            progress=lambda name, share: report({"event": "phase", "name": name, "share": share}),
            loss=lambda model, batch: training_loss(model, batch, recipe.task),
        )
        saved = _saved(model, config, recipe.seq_len)
        rows += [
            {"place": place, "method": config.method, "layer": layer, "nats": loss, "mflop_saved": saved[layer]}
            for layer, loss in losses.items()
        ]
    tokens = sum(batch["input_ids"].numel() for batch in held_out if "input_ids" in batch)
    if budget is None:
        return Sensitivity(rows=rows, recipe=None, predicted=None, tokens=tokens)
    keys = [(row["place"], row["layer"]) for row in rows]
    allowed = math.log(budget) / INTERACTION
    chosen = set(
        choose_layers(
            {key: row["nats"] for key, row in zip(keys, rows, strict=True)},
            {key: row["mflop_saved"] for key, row in zip(keys, rows, strict=True)},
            allowed,
        )
    )
    if not chosen:
        least = min(row["nats"] for row in rows)
        raise ValueError(
            f"budget={budget} fits no layer: the cheapest alone costs {math.exp(least):.3f} times the dense "
            "perplexity. Raise the budget, or keep more (keep_ratio, shared_ratio, num_active)."
        )
    rows = [{**row, "kept": key in chosen} for key, row in zip(keys, rows, strict=True)]
    lost = sum(max(row["nats"], 0.0) for row in rows if row["kept"])
    return Sensitivity(
        rows=rows, recipe=_with_layers(recipe, chosen), predicted=math.exp(INTERACTION * lost), tokens=tokens
    )


def _held_out(parts: Parts) -> list[dict[str, Any]]:
    """Held-out batches of about `eval_tokens` tokens, at least one."""
    recipe, rows = parts.recipe, parts.bundle.eval
    assert rows is not None
    wanted = max(1, min(len(rows), recipe.eval_tokens // recipe.seq_len))
    places = [i * len(rows) // wanted for i in range(wanted)]
    return [
        {name: tensor.to(parts.device) for name, tensor in parts.bundle.collate_fn([rows[i]]).items()} for i in places
    ]


def _saved(model: Any, config: Any, seq_len: int) -> dict[int, float]:
    """Layer -> forward MFLOP a token less than dense."""
    saved: dict[int, float] = {}
    for edit in plan(model, config, seq_tokens=seq_len).edits:
        dense, sparse = edit.cost(seq_len)
        saved[edit.layer] = saved.get(edit.layer, 0.0) + (dense.flops - sparse.flops) / 1e6
    return saved


def _with_layers(recipe: Recipe, chosen: set[tuple[int, int]]) -> Recipe:
    """The recipe with each method on its chosen layers; a method that got none is left out."""
    methods = []
    for place, config in enumerate(recipe.configs):
        layers = tuple(sorted(layer for at, layer in chosen if at == place))
        if layers:
            methods.append(plain_values(dataclasses.replace(config, layers=layers, from_depth=0.0)))
    values = recipe.model_dump(exclude_none=True, exclude={"methods", "resume"})
    return Recipe.from_values(values | {"methods": methods})
