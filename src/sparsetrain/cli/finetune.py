"""`sparsetrain finetune`: one run of a recipe, or with `--compare dense` two beside each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from sparsetrain.cli.answer import Answer
from sparsetrain.cli.choice_flags import Again, GoalFlag, Memory, Seconds, Tolerance, choice_asked
from sparsetrain.cli.flags import KEEP, Debug, Json, RecipeFile, takes
from sparsetrain.cli.live import refuse_launched, speaks, telling
from sparsetrain.cli.passed_flags import FINETUNE_FLAGS, passed
from sparsetrain.cli.unsaid import settled

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check the recipe, model and data; print the plan; train nothing.")
]

PushToHub = Annotated[
    bool,
    typer.Option("--push-to-hub", rich_help_panel=KEEP, help="Upload the trained model to the hub in the end."),
]
HubModelId = Annotated[
    str | None,
    typer.Option("--hub-model-id", metavar="NAME", rich_help_panel=KEEP, show_default="name of --output",
                 help="Repository for --push-to-hub; a new one is private."),
]  # fmt: skip


@takes(*FINETUNE_FLAGS, table=FINETUNE_FLAGS)
def finetune(
    recipe: RecipeFile = None,
    memory: Memory = None,
    tolerance: Tolerance = None,
    goal: GoalFlag = None,
    choose_seconds: Seconds = None,
    choose_again: Again = False,
    push_to_hub: PushToHub = False,
    hub_model_id: HubModelId = None,
    dry_run: DryRun = False,
    json: Json = False,
    debug: Debug = False,
    **flags: Any,
) -> Answer | None:
    """Fine-tune a pretrained model on LoRA or on all weights, in the way that pays: sparse where it does, else dense.

    Without --preset and --method it chooses by itself: of what was seen to keep to the quality of dense LoRA on such
    data, the fastest on this machine; often that is dense LoRA. Trains, and writes the adapter, checkpoints, the recipe
    and report.html into --output, with the perplexity before and after. Killed at any moment, it goes on with --resume.

    Without --task it goes by model and rows: conversations, prompts and questions with what follows are sft, a model of
    images is trained on pictures; without --seq-len rows are no longer than the model takes. A line says so.

    \b
    Examples:
      sparsetrain finetune --model smollm2-135m --data python-stdlib --steps 100
      sparsetrain finetune --model smollm2-135m --data notes.jsonl --task sft --epochs 2
      sparsetrain finetune --model minilm --data reviews.csv --task classify --memory 4GB --goal memory
      sparsetrain finetune --model ./llama --data '*.txt' --method routed_ffn:num_blocks=8
      sparsetrain finetune --recipe run.yaml --seed 1 --output runs/seed1

    METHODS

    PRESETS

    A recipe file has one line a flag, spelled with underscores ([cyan]seq_len: 2048[/]), and for --set the mappings
    [cyan]training:[/] and [cyan]lora:[/]; a run writes its own as recipe.yaml.

    Hugging Face's names are taken too, with - or _: --model-name-or-path, --dataset-name, --output-dir, --max-length,
    --per-device-train-batch-size, --gradient-accumulation-steps, --max-steps, --num-train-epochs, --learning-rate,
    --lr-scheduler-type, --lora-target-modules, --save-steps, --save-total-limit, --eval-steps, --bf16, --use-dora,
    --use-rslora.

    [bold]When not to use it[/]: if sequences are short and dense LoRA fits and is fast enough. --compare dense measures
    that on your model, data and machine.
    """
    from sparsetrain.recipes.finetune import Recipe

    wanted = {"memory": memory, "tolerance": tolerance, "goal": goal, "choose_seconds": choose_seconds}
    given, unsaid = settled(passed(flags, Recipe.sections), recipe)
    asked = Recipe.from_yaml(recipe, given) if recipe else Recipe.from_values(given)
    by = choice_asked(asked, **wanted, choose_again=choose_again)
    refuse_launched(compares=asked.compare == "dense", chooses=by is not None, dry_run=dry_run)
    repository = _repository(asked, push_to_hub, hub_model_id)
    with telling(unsaid) as tell:
        answer = _answered(asked, tell, dry_run) if by is None else _chosen(asked, by, tell, dry_run)
    if not speaks():
        return None
    return answer if repository is None or dry_run else _pushed(answer, repository)


def _repository(recipe: Any, wanted: bool, name: str | None) -> str | None:
    """Where the trained model is to be uploaded, after that was found possible; None for nowhere."""
    if not wanted:
        if name is not None:
            raise ValueError(f"--hub-model-id {name} is for --push-to-hub. Give that too, or leave it out.")
        return None
    if recipe.compare != "none":
        raise ValueError("--push-to-hub uploads one model, and a comparison trains two. Leave one out.")
    from sparsetrain.hf.train.hub import check_can_push

    return check_can_push(name, recipe.output)


def _pushed(answer: Answer, repository: str) -> Answer:
    from sparsetrain.hf.train.hub import push

    address = push(answer.data["saved"], repository)
    return replace(answer, data=answer.data | {"hub": address}, show=[*answer.show, f"On the hub: {address}"])


def _chosen(asked: Any, by: Any, tell: Any, dry_run: bool) -> Answer:
    """The answer for the recipe that `preset: auto` turns into."""
    from sparsetrain.hf.study.choose import choose
    from sparsetrain.hf.study.preview import check_fetched

    if dry_run:
        check_fetched(asked)
    choice = choose(asked, by, report=tell, timed=not dry_run)
    recipe = choice.recipe
    if recipe.compare == "dense" and not recipe.methods:
        tell({"event": "note", "text": "There is nothing to compare dense training with, so it runs alone."})
        recipe = recipe.model_copy(update={"compare": "none"})
    answer = _answered(recipe, tell, dry_run, choice)
    return replace(answer, data=answer.data | {"choice": choice.values})


def _answered(recipe: Any, tell: Any, dry_run: bool, choice: Any = None) -> Answer:
    if dry_run:
        return previewed(recipe, tell)
    return (compared if recipe.compare == "dense" else _trained)(recipe, tell, choice)


def _trained(recipe: Any, tell: Any, choice: Any = None) -> Answer:
    from sparsetrain.hf.train.finetune import finetune as train
    from sparsetrain.hf.train.finetune import run_report
    from sparsetrain.measure import render_text

    given = {} if choice is None else {"choice": choice.values, "opened": choice.opened}
    result = train(recipe, report=tell, **given)
    lines = render_text(run_report(result))
    return Answer(data=result.to_dict(), show=[*lines, *next_steps(recipe, recipe.output)])


def compared(recipe: Any, tell: Any, choice: Any = None) -> Answer:
    from sparsetrain.hf.study.compare import compare
    from sparsetrain.measure import render_text

    made = compare(recipe, report=tell, choice=None if choice is None else choice.values)
    data = {"sparse": made.sparse, "dense": made.dense, "report": made.report}
    return Answer(data=data, show=[*render_text(made.report), *next_steps(recipe, f"{recipe.output}/sparse")])


def next_steps(recipe: Any, trained: str) -> list[str]:
    from sparsetrain.recipes.tasks import task_of

    return [
        f"Report: {recipe.output}/report.html",
        *([f"Try it: sparsetrain chat {trained}"] if task_of(recipe.task).causal else []),
        f"Measure it again: sparsetrain eval {trained}",
        f"Use it elsewhere: sparsetrain export {trained} --output DIR",
    ]


def previewed(recipe: Any, tell: Any) -> Answer:
    """Everything that can be checked without reading weights; writes nothing."""
    from sparsetrain.hf.study.preview import preview

    found = preview(recipe, report=tell)
    data = found.to_dict() | {"dry_run": True, "data": {"description": found.data, **found.counts}}
    return Answer(data=data, show=[*found.lines(), "As a recipe file:\n" + recipe.to_yaml()])
