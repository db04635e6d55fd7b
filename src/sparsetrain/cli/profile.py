"""`sparsetrain profile`: what one training step holds and takes, by component, beside dense LoRA if asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsetrain.cli.answer import Answer, table
from sparsetrain.cli.flags import FLAGS, STUDY_FLAGS, Debug, Json, RecipeFile, changes, studied, takes
from sparsetrain.cli.live import to_stderr
from sparsetrain.core.files import write_whole

Plot = Annotated[
    Path | None,
    typer.Option("--plot", "--output", metavar="FILE", help="Draw it: FILE.png, or FILE.html with all tables."),
]
Layers = Annotated[bool, typer.Option("--layers", help="Also print each layer.")]


@takes(
    "model", "data", "task", "text_column", "seq_len", "batch_size", "grad_accum", "steps", "preset", "methods",
    "calibration_tokens", "compare", "lora_r", "lora_alpha", "lora_targets", "seed", "dtype", "gradient_checkpointing",
    "device", "threads", table=STUDY_FLAGS | {"steps": replace(FLAGS["steps"], default="1")},
)  # fmt: skip
def profile(
    recipe: RecipeFile = None,
    plot: Plot = None,
    layers: Layers = False,
    json: Json = False,
    debug: Debug = False,
    **flags: Any,
) -> Answer:
    """Measure one training step: memory by part, component and layer, and time by component, forward and backward.

    Loads and converts the model in a fresh process, trains --steps steps on the clock and one under a
    tracer of tensors, and keeps nothing. Without --data, rows of random tokens are used.

    \b
    Examples:
      sparsetrain profile --model smollm2-135m --preset spt --seq-len 1024
      sparsetrain profile --model smollm2-135m --preset spt --compare dense --plot profile.html
      sparsetrain profile --model minilm --task classify --preset dense --seq-len 128 --json
    """
    from sparsetrain.hf.data.random_tokens import RANDOM
    from sparsetrain.hf.study.profile import profile_recipe
    from sparsetrain.measure.profile_report import page, picture, tables
    from sparsetrain.recipes.finetune import Recipe
    from sparsetrain.runs.places import check_file

    if plot is not None:
        check_file(plot, "--plot", (".png", ".html"))
    given = changes(flags)
    given |= {"steps": given.get("steps", 1), "epochs": None}  # a recipe file's own steps are those of its training
    asked = Recipe.from_yaml(recipe, given) if recipe else Recipe.from_values({"data": RANDOM, **given})
    asked = studied(asked, flags)
    found = profile_recipe(asked, steps=asked.steps or 1, compare=asked.compare == "dense", report=to_stderr)
    methods = " + ".join(config.method for config in asked.configs) or "dense"
    title = f"A training step of {asked.model}: {methods}, {asked.batch_size} x {asked.seq_len:,} tokens"
    if plot is not None:
        plot.parent.mkdir(parents=True, exist_ok=True)
        if plot.suffix.lower() == ".png":
            write_whole(plot, picture(found.sides))
        else:
            write_whole(plot, page(title, found.sides, found.notes))

    def shown(name: str, columns: list[str], rows: list[list[str]]) -> Any:
        return lambda: table(name, columns, rows, right=tuple(range(1, len(columns))))

    return Answer(
        data=found.to_dict() | ({"plot": plot} if plot else {}),
        show=[title, *(shown(*each) for each in tables(found.sides, layers)), *found.notes]
        + ([f"Drawn: {plot}"] if plot else []),
    )
