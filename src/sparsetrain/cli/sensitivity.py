"""`sparsetrain sensitivity`: which layers a method can take at what loss, and the recipe that keeps to a budget."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsetrain.cli.answer import Answer, table
from sparsetrain.cli.flags import STUDY_FLAGS, Debug, Json, RecipeFile, changes, studied, takes
from sparsetrain.cli.live import telling

Budget = Annotated[
    float | None,
    typer.Option(
        "--budget",
        metavar="RATIO",
        help="Perplexity allowed before training, as a multiple of the dense one, e.g. 1.25; layers are chosen for it.",
    ),
]
Write = Annotated[
    Path | None, typer.Option("--write", metavar="FILE.yaml", help="Write the chosen recipe, for finetune --recipe.")
]


@takes("model", "data", "task", "text_column", "holdout", "seq_len", "preset", "methods", "calibration_tokens",
       "eval_tokens", "steps", "seed", "dtype", "device", "threads",
       table=STUDY_FLAGS)  # fmt: skip
def sensitivity(
    recipe: RecipeFile = None,
    budget: Budget = None,
    write: Write = None,
    json: Json = False,
    debug: Debug = False,
    **flags: Any,
) -> Answer:
    """Measure how much the loss rises when each layer alone is made sparse, and choose layers within a budget.

    Every method of the recipe is fitted once, then tried one layer at a time on held-out rows. With --budget, the
    layers that save most for their loss are kept while the predicted perplexity stays within it; --write saves that
    recipe. Takes about a minute for each ten layers of a small model; --eval-tokens 2048 is enough to order layers.

    \b
    Examples:
      sparsetrain sensitivity --model smollm2-135m --data python-stdlib --eval-tokens 2048
      sparsetrain sensitivity --model smollm2-135m --data python-stdlib --budget 1.2 --write my.yaml
      sparsetrain finetune --recipe my.yaml
    """
    import torch

    from sparsetrain.hf.model.io import quiet
    from sparsetrain.hf.study.sensitivity import sensitivity as measure
    from sparsetrain.recipes.finetune import Recipe
    from sparsetrain.runs.places import check_file

    if write is not None and budget is None:
        raise ValueError("--write saves the layers chosen for a budget, and --budget is not given. Give e.g. 1.25.")
    if budget is not None and not (math.isfinite(budget) and budget > 1):
        raise ValueError(f"--budget {budget} allows no loss, or any. Give a multiple above 1 of the dense perplexity.")
    if write is not None:
        check_file(write, "--write", (".yaml", ".yml"))
    given = changes(flags)
    asked = Recipe.from_yaml(recipe, given) if recipe else Recipe.from_values(given)
    asked = studied(asked, flags)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    with telling() as tell, quiet():
        found = measure(asked, budget=budget, report=tell)
    show: list[Any] = [lambda: _table(found)]
    if found.recipe is not None:
        kept = sum(row["kept"] for row in found.rows)
        show.append(
            f"{kept} of {len(found.rows)} sites kept; about {found.predicted:.2f} times the dense perplexity before "
            "training. finetune measures it."
        )
    if write is not None and found.recipe is not None:
        write.parent.mkdir(parents=True, exist_ok=True)
        found.recipe.to_yaml(write)
        show.append(f"Wrote {write}. Next: sparsetrain finetune --recipe {write}")
    data = {"rows": found.rows, "tokens": found.tokens, "budget": budget, "predicted_ratio": found.predicted}
    data |= {"recipe": found.recipe.model_dump(mode="json") if found.recipe else None, "written": write}
    return Answer(data=data, show=show)


def _table(found: Any) -> Any:
    rows = [
        [
            row["method"],
            str(row["layer"]),
            f"{row['nats']:+.4f}",
            f"{row['mflop_saved']:.2f}",
            *(["yes" if row["kept"] else ""] if "kept" in row else []),
        ]
        for row in found.rows
    ]
    columns = ["method", "layer", "loss, nats", "MFLOP saved a token"] + (["kept"] if found.recipe else [])
    return table(f"Loss of each layer alone, on {found.tokens:,} held-out tokens", columns, rows, right=(1, 2, 3))
