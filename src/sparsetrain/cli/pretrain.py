"""`sparsetrain pretrain`: one run from random weights, or with `--compare dense` two beside each other."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sparsetrain.cli.answer import Answer
from sparsetrain.cli.finetune import DryRun, compared, next_steps, previewed
from sparsetrain.cli.flags import Debug, Json, RecipeFile, takes
from sparsetrain.cli.live import refuse_launched, speaks, telling
from sparsetrain.cli.passed_flags import PRETRAIN_PASSED, passed
from sparsetrain.cli.pretrain_flags import PRETRAIN_FLAGS

Grid = Annotated[
    str | None,
    typer.Option(
        "--grid",
        metavar="data=N,z=N,x=N,y=N",
        help="Cut the weights over a grid of processes that torchrun has started (`plan --gpus` prices grids).",
    ),
]
GridMode = Annotated[
    str,
    typer.Option(
        "--grid-mode",
        metavar="plain|expert",
        help="With --grid. plain: rows are exchanged around each linear. expert: features stay cut between them.",
    ),
]


@takes(*PRETRAIN_FLAGS, *PRETRAIN_PASSED, table=PRETRAIN_FLAGS | PRETRAIN_PASSED)
def pretrain(
    recipe: RecipeFile = None,
    grid: Grid = None,
    grid_mode: GridMode = "plain",
    dry_run: DryRun = False,
    json: Json = False,
    debug: Debug = False,
    **flags: Any,
) -> Answer | None:
    """Train a Transformer from random weights, dense or with any sparse methods.

    Makes the model from a config, converts it, trains it, and writes the model, checkpoints, the recipe and report.html
    into --output. Schedules run by themselves: flood-fill attention goes from dense to sparse, 2:4 back to dense at the
    end. Killed at any moment, it goes on with --resume.

    \b
    A small GPT on Python's own sources, byte by byte, its FFNs 2:4 sparse:
      sparsetrain pretrain --model gpt2-nano --data python-stdlib --method semi_structured
    Long sequences, dense first, then each layer's own block pattern, beside the dense twin:
      sparsetrain pretrain --model sequence-encoder --task classify --data listops --seq-len 2048 \\
        --method flood_fill_attention:quantile=0.98 --compare dense
    Images as patches, in a wider model than the built-in one:
      sparsetrain pretrain --model vit-nano --set hidden_size=128 --task image --data fashion-mnist
    SPION's published settings, one file a task:
      sparsetrain pretrain --recipe examples/spion-listops.yaml
    Through a smaller model (a V-cycle), beside the ordinary run at the best of three learning rates:
      sparsetrain pretrain --model gpt2-nano --data python-stdlib --method multi_level:levels=2 \\
        --compare dense --compare-lr 5e-4,1e-3,2e-3
    The same, leaving the small model when two runs of 300 steps say so:
      sparsetrain pretrain --recipe examples/multi-level.yaml --find-switch 300
    Dense, on a grid of eight processes; `--resume` takes any other grid:
      torchrun --nproc-per-node 8 -m sparsetrain.cli pretrain --model gpt2-nano --data notes --grid data=2,x=2,y=2
    What it would do, without training:
      sparsetrain pretrain --model my-config.json --data notes --dry-run

    METHODS

    No --method: dense.

    A recipe file has one line a flag, spelled with underscores ([cyan]seq_len: 2048[/]), and [cyan]set:[/],
    [cyan]training:[/] and [cyan]methods:[/] with lines of their own; a run writes its own as recipe.yaml.

    Hugging Face's names are taken too, with - or _: --learning-rate, --max-steps, --output-dir and so on.

    [bold]When not to use it[/]: to adapt a pretrained model (finetune does). 2:4 is emulated on a CPU and saves no
    time there; block patterns pay from about 1,000 tokens on. --compare dense measures both on your machine.
    """
    from sparsetrain.hf.train.pretrain import PretrainRecipe

    given = passed(flags, PretrainRecipe.sections)
    asked = PretrainRecipe.from_yaml(recipe, given) if recipe else PretrainRecipe.from_values(given)
    _refuse_alone(asked)
    refuse_launched(compares=asked.compare == "dense", dry_run=dry_run)
    with telling() as tell:
        if grid is not None:
            return _on_grid(asked, grid, grid_mode, tell)
        if dry_run:
            return previewed(asked, tell)
        answer = compared(asked, tell) if asked.compare == "dense" else _trained(asked, tell)
    return answer if speaks() else None


def _on_grid(recipe: Any, grid: str, mode: str, tell: Any) -> Answer | None:
    """Rank 0 answers; the others are silent."""
    from sparsetrain.hf.train.grid import pretrain_on_grid
    from sparsetrain.parallel.shape import GridShape

    if mode not in ("plain", "expert"):
        raise ValueError(f"--grid-mode {mode!r} is unknown. Choose plain or expert.")
    result = pretrain_on_grid(recipe, GridShape.from_text(grid), mode, tell)  # type: ignore[arg-type]
    if result is None:
        return None
    losses = result["losses"]
    lines = [f"{result['steps']} steps, loss {losses[0]:.4f} -> {losses[-1]:.4f}; model in {result['output']}/model."]
    return Answer(data=result, show=[*result["report"], *lines])


def _refuse_alone(recipe: Any) -> None:
    """Raise ValueError for keys that mean something beside the ordinary run alone."""
    if recipe.compare_lr and recipe.compare != "dense":
        raise ValueError(f"compare_lr={list(recipe.compare_lr)} tunes the dense side. Give --compare dense too.")
    if recipe.find_switch and recipe.compare != "dense":
        raise ValueError(f"find_switch={recipe.find_switch} is judged by the ordinary run. Give --compare dense too.")


def _trained(recipe: Any, tell: Any) -> Answer:
    from sparsetrain.hf.study.stage_trace import planned_stages
    from sparsetrain.hf.train.pretrain import pretrain as train
    from sparsetrain.hf.train.run import run_report
    from sparsetrain.measure import render_text

    result = train(recipe, report=tell, forecast=planned_stages)
    return Answer(data=result.to_dict(), show=[*render_text(run_report(result)), *next_steps(recipe, recipe.output)])
