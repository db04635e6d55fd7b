"""`sparsetrain finetune`: one run of a recipe, or with `--compare dense` two beside each other."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from sparsetrain.cli.answer import Answer
from sparsetrain.cli.flags import FLAGS, METHODS_HELP, Debug, Json, RecipeFile, changes, takes
from sparsetrain.cli.live import telling

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check the recipe, model and data; print the plan; train nothing.")
]


@takes(*FLAGS)
def finetune(
    recipe: RecipeFile = None, dry_run: DryRun = False, json: Json = False, debug: Debug = False, **flags: Any
) -> Answer:
    """Fine-tune a pretrained model with sparse attention and routed FFNs, on LoRA or on all weights.

    Converts the model, trains it, and writes the adapter, checkpoints, the recipe and report.html into --output, with
    the perplexity before, after conversion and after training. Killed at any moment, it goes on with --resume.

    \b
    Examples:
      sparsetrain finetune --model smollm2-135m --data python-stdlib --steps 100
      sparsetrain finetune --model smollm2-135m --data notes.jsonl --task sft --epochs 2
      sparsetrain finetune --model minilm --data reviews.csv --task classify --preset dense
      sparsetrain finetune --model ./llama --data '*.txt' --method routed_ffn:num_blocks=8
      sparsetrain finetune --recipe run.yaml --seed 1 --output runs/seed1

    METHODS

    A recipe file has one line a flag, spelled with underscores ([cyan]seq_len: 2048[/]); a run writes its own as
    recipe.yaml.

    [bold]When not to use it[/]: if sequences are short and dense LoRA fits and is fast enough. --compare dense measures
    that on your model, data and machine.
    """
    from sparsetrain.recipes.finetune import Recipe

    given = changes(flags)
    asked = Recipe.from_yaml(recipe, given) if recipe else Recipe.from_values(given)
    with telling() as tell:
        if dry_run:
            return previewed(asked, tell)
        if asked.compare == "dense":
            return compared(asked, tell)
        return _trained(asked, tell)


finetune.__doc__ = inspect.cleandoc(finetune.__doc__ or "").replace("METHODS", METHODS_HELP)


def _trained(recipe: Any, tell: Any) -> Answer:
    from sparsetrain.hf.train.finetune import finetune as train
    from sparsetrain.hf.train.finetune import run_report
    from sparsetrain.measure import render_text

    result = train(recipe, report=tell)
    lines = render_text(run_report(result))
    return Answer(data=result.to_dict(), show=[*lines, *next_steps(recipe, recipe.output)])


def compared(recipe: Any, tell: Any) -> Answer:
    from sparsetrain.hf.study.compare import compare
    from sparsetrain.measure import render_text

    made = compare(recipe, report=tell)
    data = {"sparse": made.sparse, "dense": made.dense, "report": made.report}
    return Answer(data=data, show=[*render_text(made.report), *next_steps(recipe, f"{recipe.output}/sparse")])


def next_steps(recipe: Any, trained: str) -> list[str]:
    return [
        f"Report: {recipe.output}/report.html",
        f"Measure it again: sparsetrain eval {trained}",
        f"Use it elsewhere: sparsetrain export {trained} --output DIR",
    ]


def previewed(recipe: Any, tell: Any) -> Answer:
    """Everything that can be checked without reading weights; writes nothing."""
    from sparsetrain.hf.study.preview import preview

    found = preview(recipe, report=tell)
    data = found.to_dict() | {"dry_run": True, "data": {"description": found.data, **found.counts}}
    return Answer(data=data, show=[*found.lines(), "As a recipe file:\n" + recipe.to_yaml()])
