"""`sparsetrain bench`: does it pay here? Every method on your model, length and machine, against dense in turns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsetrain.cli.answer import Answer, table, to_json
from sparsetrain.cli.flags import Debug, Json, RecipeFile, changes, takes
from sparsetrain.cli.live import to_stderr
from sparsetrain.core.files import write_whole
from sparsetrain.core.units import interval_text

Names = Annotated[
    str | None,
    typer.Option(
        "--methods",
        "--preset",
        metavar="all|NAMES",
        help="Methods with their defaults, and presets; with commas. Either name, for either.",
        show_default="all, or none beside --method",
    ),
]
Rounds = Annotated[
    int,
    typer.Option("--rounds", help="Timed pairs of steps; up to three times as many while the verdict is undecided."),
]
LayerCount = Annotated[int | None, typer.Option("--layers", help="Run only the first N layers.", show_default="all")]
Quick = Annotated[bool, typer.Option("--quick", help="4 layers, and the vocabulary cut in proportion.")]
Output = Annotated[Path, typer.Option("--output", metavar="DIR", help="Folder for bench.json and measured.json.")]


@takes(
    "model", "data", "task", "text_column", "seq_len", "batch_size", "grad_accum", "methods", "lora_r", "lora_alpha",
    "lora_targets", "seed", "dtype", "gradient_checkpointing", "device", "threads",
)  # fmt: skip
def bench(
    recipe: RecipeFile = None,
    names: Names = None,
    rounds: Rounds = 7,
    layers: LayerCount = None,
    quick: Quick = False,
    output: Output = Path("runs/bench"),
    json: Json = False,
    debug: Debug = False,
    **flags: Any,
) -> Answer:
    """Time every method on your model, length and machine against the strongest dense step, correctness first.

    A candidate whose dense limit is not the dense model, or whose fast path is not the reference, is refused and gets
    no number. The others get a verdict on whole steps, timed in turns: a win where the interval of the ratio begins
    above 1.02, else a tie or a loss. measured.json is for [cyan]sparsetrain plan[/]. No --data: random tokens.

    \b
    Examples:
      sparsetrain bench --model smollm2-135m --seq-len 2048
      sparsetrain bench --model ./llama --seq-len 4096 --methods spt --layers 8
      sparsetrain bench --model smollm2-135m --method routed_ffn:num_blocks=8,num_active=2 --quick
    """
    import sparsetrain.methods  # noqa: F401  (enters them in the registry)
    from sparsetrain.hf.data.random_tokens import RANDOM
    from sparsetrain.hf.study.bench import QUICK_LAYERS, candidates
    from sparsetrain.hf.study.bench import bench as measure
    from sparsetrain.recipes.finetune import Recipe
    from sparsetrain.runs.claim import writing_into
    from sparsetrain.runs.places import check_folder

    _check(names, rounds, layers)
    given = changes(flags)
    asked = Recipe.from_yaml(recipe, given) if recipe else Recipe.from_values({"data": RANDOM, "methods": [], **given})
    chosen = candidates(names or ("" if asked.configs else "all"), asked.configs)
    check_folder(output, "--output")
    with writing_into(output):
        found = measure(
            asked,
            chosen,
            rounds=rounds,
            layers=(QUICK_LAYERS if quick else None) if layers is None else layers,
            report=to_stderr,
        )
        data = found.to_dict()
        write_whole(output / "bench.json", to_json(data) + "\n")
        write_whole(output / "measured.json", to_json(found.rates.to_dict()) + "\n")
    size = f"{asked.batch_size} x {asked.seq_len:,} tokens, {found.layers} of {found.model_layers} layers"
    columns = ["candidate", "verdict", "step, dense / ours", "interval", "part", "saved bytes"]
    written = f"Written: {output / 'bench.json'}, and {output / 'measured.json'} for sparsetrain plan."
    return Answer(
        data=data,
        show=[
            f"{asked.model}, {size}; against {data['baseline']}",
            lambda: table("", columns, [_row(each) for each in found.outcomes], right=(2, 3, 4, 5)),
            *_about(found.outcomes, asked),
            *found.notes,
            written,
        ],
    )


def _check(names: str | None, rounds: int, layers: int | None) -> None:
    if names is not None and not names.strip(", "):
        raise ValueError("--methods is empty. Give all, or names with commas (`sparsetrain methods` lists them).")
    if not 3 <= rounds <= 10_000:
        raise ValueError(f"--rounds {rounds}: fewer than 3 give no quartiles, and 10,000 are plenty. Give at least 3.")
    if layers is not None and layers < 1:
        raise ValueError(f"--layers {layers} runs no layer. Give at least 1.")


def _about(outcomes: Any, asked: Any) -> list[str]:
    """Why candidates were refused, and which were timed against another dense step than others."""
    refused = [f"{each.name}: {each.reason}" for each in outcomes if each.reason]
    return refused + [
        f"{each.name}: without LoRA, against a dense step that trains all weights."
        for each in outcomes
        if each.step is not None and asked.lora_r and each.against == "all weights"
    ]


def _row(outcome: Any) -> list[str]:
    if outcome.step is None:
        return [outcome.name, outcome.verdict, "", "", "", ""]
    step, saved = outcome.step, outcome.saved_bytes / outcome.dense_saved_bytes
    return [
        outcome.name,
        outcome.verdict,
        f"{step.median:.2f}",
        interval_text(step.low, step.high),
        f"{outcome.part.median:.2f}",
        f"{saved:.2f}x",
    ]
