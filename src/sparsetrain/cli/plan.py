"""`sparsetrain plan` and `sparsetrain methods`: what a recipe would change, and what a method can be asked."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsetrain.cli.answer import Answer, table
from sparsetrain.cli.flags import FLAGS, STUDY_FLAGS, Debug, Json, RecipeFile, changes, studied, takes
from sparsetrain.cli.live import to_stderr
from sparsetrain.cli.passed_flags import PASSED
from sparsetrain.cli.plan_grid import planned_grids
from sparsetrain.cli.predict import predicted
from sparsetrain.cli.prediction import Goal
from sparsetrain.cli.unsaid import settled

_PREDICT = "Prediction"
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        rich_help_panel=_PREDICT,
        help="What training may use: 24GB, 16GiB. "
        "Predicts memory and time of every way to train, and picks one that fits.",
    ),
]
GoalFlag = Annotated[
    str | None,
    typer.Option(
        "--goal",
        metavar="fit|speed|memory",
        rich_help_panel=_PREDICT,
        help="fit: the safest that fits, then the fastest. speed: the fastest that fits. memory: the leanest.",
    ),
]
Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        metavar="NAME|FILE.json",
        rich_help_panel=_PREDICT,
        help="h200, h100, a100, 4090 or cpu; or "
        "the rates that `sparsetrain bench` measured; this machine if not given. Its memory is the limit "
        "unless --memory says another.",
    ),
]
Fit = Annotated[
    str | None,
    typer.Option(
        "--fit",
        metavar="seq|batch",
        rich_help_panel=_PREDICT,
        help="Instead: the longest sequence, or the largest batch, that fits in --memory.",
    ),
]
Write = Annotated[
    Path | None,
    typer.Option(
        "--write",
        metavar="FILE.yaml",
        rich_help_panel=_PREDICT,
        help="Write the picked recipe, for `finetune --recipe`.",
    ),
]
_DRAW = "Draw predicted memory by component."
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", rich_help_panel=_PREDICT, help=_DRAW)]
_GRID = "Grid of devices"
Gpus = Annotated[
    int | None,
    typer.Option("--gpus", metavar="INT", rich_help_panel=_GRID, help="Price every grid of so many devices."),
]
PerNode = Annotated[
    int | None,
    typer.Option("--gpus-per-node", metavar="INT", rich_help_panel=_GRID, help="Devices in a node; all if not given."),
]
Bandwidth = Annotated[
    str | None,
    typer.Option(
        "--bandwidth",
        metavar="node=SIZE/s,inter=SIZE/s",
        rich_help_panel=_GRID,
        help="Of a device inside its node, and of a node to the others: node=200GB/s,inter=100GB/s.",
    ),
]
_ONE_PRESET = replace(STUDY_FLAGS["preset"], default="", help="One set of methods, in place of all ways.")
Seq = Annotated[str | None, typer.Option("--seq", metavar="INT", help="The same as --seq-len.", hidden=True)]
Batch = Annotated[str | None, typer.Option("--batch", metavar="INT", help="The same as --batch-size.", hidden=True)]


@takes(
    "model", "task", "preset", "methods", "seq_len", "batch_size", "grad_accum", "lora_r", "lora_dtype", "load_in_4bit",
    "load_in_8bit", "optim", "dtype", "data", "streaming", "stream_rows", "gradient_checkpointing",
    table=FLAGS | {"preset": _ONE_PRESET} | PASSED,
)  # fmt: skip
def plan(
    recipe: RecipeFile = None,
    memory: Memory = None,
    goal: GoalFlag = None,
    gpu: Gpu = None,
    fit: Fit = None,
    write: Write = None,
    plot: Plot = None,
    gpus: Gpus = None,
    gpus_per_node: PerNode = None,
    bandwidth: Bandwidth = None,
    seq: Seq = None,
    batch: Batch = None,
    json: Json = False,
    debug: Debug = False,
    **flags: Any,
) -> Answer:
    """Will it fit, what uses the memory, and which recipe? Predicted from a model's config: no weights, no GPU.

    Of a model on this machine, or with a goal (--memory, --goal, --gpu, --fit): peak memory by component and step time
    of LoRA, of the exact tools (checkpointing, offload, FFNs in pieces), of full fine-tuning and of every sparse
    method, and the memory by context length; what to take, the exact before what is not, what was refused and why, and
    the recipe with --write. With --data it reads how long the rows are. Ends with exit code 1 when nothing fits, and
    says what is nearest.

    With --preset or --method and no goal: which parts of the model the methods change, and what each costs. Of a
    recipe for `pretrain`: what it would train, and of one whose method makes several models the size, steps, FLOPs,
    time and peak of each stage.

    With --gpus: every grid data x z x x x y of so many devices, what each collective takes in a step of --batch-size
    sequences (over all devices), memory a rank, and what was refused; --memory or --gpu sets the limit.

    \b
    Examples:
      sparsetrain plan --model smollm2-135m --data rows.csv --task sft
      sparsetrain plan --model llama-3-8b --memory 24GB --seq-len 8192 --gpu 4090
      sparsetrain plan --model smollm2-135m --memory 2GB --goal speed --write plan.yaml
      sparsetrain plan --model Qwen/Qwen2.5-7B --gpu h100 --fit seq
      sparsetrain plan --model ./llama --method "routed_ffn:num_blocks=8,layers=4-9"
      sparsetrain plan --recipe pretrain.yaml
      sparsetrain plan --model llama-3-70b --gpus 1024 --gpus-per-node 4 --bandwidth node=200GB/s,inter=100GB/s
    """
    for key, other in (("seq_len", seq), ("batch_size", batch)):
        flags[key] = other if flags[key] is None else flags[key]
    if flags["optim"] is not None:
        _check_optimizer(flags["optim"])
    if gpus is not None:
        return planned_grids(_asked(recipe, flags), gpus, gpus_per_node, bandwidth, memory, gpu)
    asked_for = Goal(memory=memory, goal=goal, gpu=gpu, fit=fit, write=write, plot=plot, data=flags["data"])
    if asked_for.given or (recipe is None and flags["preset"] in (None, "auto") and not flags["methods"]):
        return _predicted(recipe, flags, asked_for)
    return _pretrained(recipe, changes(flags)) or _edits(recipe, flags)


def _check_optimizer(name: str) -> None:
    """Raise ValueError if `finetune` would not know it; one whose state isn't known is planned as AdamW."""
    from sparsetrain.core.config import suggest
    from sparsetrain.core.fields import shown
    from sparsetrain.planner.optimizers import KINDS

    if name in KINDS:  # known without asking transformers, which takes seconds
        return
    from sparsetrain.hf.train.passed import optimizers

    if name not in (known := optimizers()):
        raise ValueError(f"--optim {shown(name)} is unknown.{suggest(name, known)} Give {', '.join(known)}.")


def _asked(recipe: Path | None, flags: dict[str, Any]) -> dict[str, Any]:
    """The keys of a recipe file, with the flags over them."""
    from sparsetrain.recipes.reading import read_mapping

    return {**(read_mapping(recipe) if recipe is not None else {}), **changes(flags)}


def _pretrained(file: Path | None, given: dict[str, Any]) -> Answer | None:
    """Of a recipe for `pretrain`: what would be trained, and of a method that makes several models what each stage
    takes. None of any other."""
    from sparsetrain.cli.finetune import previewed
    from sparsetrain.hf.model.architectures import architecture_names
    from sparsetrain.recipes.entries import read_methods
    from sparsetrain.recipes.finetune import Recipe
    from sparsetrain.recipes.pretrain import PretrainRecipe
    from sparsetrain.recipes.reading import read_mapping
    from sparsetrain.surgery.method import growth_of

    values = {**(read_mapping(file) if file is not None and file.is_file() else {}), **given}
    from_random = values.get("model") in architecture_names() and "data" in values
    own_keys = values.keys() & PretrainRecipe.model_fields.keys() - Recipe.model_fields.keys()
    asked = values.get("methods")
    grows = isinstance(asked, list | tuple) and growth_of(read_methods(asked)) is not None
    if not (from_random or own_keys or grows):
        return None
    recipe = PretrainRecipe.from_yaml(file, given) if file is not None else PretrainRecipe.from_values(given)
    return previewed(recipe, to_stderr)


def _predicted(recipe: Path | None, flags: dict[str, Any], goal: Goal) -> Answer:
    given, unsaid = settled(changes(flags), recipe)
    for line in unsaid:
        to_stderr({"event": "note", "text": line})
    if given.get("preset") == "auto":  # every way is compared, unless some are named
        given["preset"] = None
    named = bool(given.get("preset") or given.get("methods"))
    if recipe is not None:
        from sparsetrain.recipes.finetune import Recipe

        asked = Recipe.from_yaml(recipe, {"data": "none", **given})
        return predicted(asked.model_dump(), goal, given_methods=bool(asked.methods))
    return predicted(given if named else {**given, "methods": []}, goal, given_methods=named)


def _edits(recipe: Path | None, flags: dict[str, Any]) -> Answer:
    """Which parts the methods change; only the config is read, so it takes seconds for any size."""
    import sparsetrain
    from sparsetrain.hf.model.models import empty_model
    from sparsetrain.hf.train.assemble import open_config

    asked = studied(_recipe(recipe, changes(flags)), flags)
    if not asked.configs:
        raise ValueError(
            "The preset dense changes nothing, so there is nothing to plan. Give --method or another --preset."
        )
    _, config = open_config(asked, to_stderr, asked.configs)
    planned = sparsetrain.plan(empty_model(config, asked.task), *asked.configs, seq_tokens=asked.seq_len)
    rows = planned.rows()
    totals = {
        key: sum(row[key] for row in rows)
        for key in ("mflop_before", "mflop_after", "saved_before", "saved_after", "added_params")
    }
    data = {
        "model_class": planned.model_class,
        "family": planned.family,
        "seq_len": planned.seq_tokens,
        "edits": rows,
        "totals": totals,
        "left_dense": planned.untouched,
    }
    left = [f"Left dense by {method}: {count} of its sites." for method, count in planned.untouched.items() if count]
    said = f"at {planned.seq_tokens:,} tokens; forward, per token; added: parameters"
    title = f"{planned.model_class} ({planned.family}) {said}"
    columns = ["sites", "MFLOP", "saved for backward", "added"]  # what 80 columns hold, with the names in one piece
    return Answer(data=data, show=[lambda: table(title, columns, _lines(rows, totals), right=(1, 2, 3)), *left])


def _lines(rows: list[dict[str, Any]], totals: Mapping[str, float]) -> list[list[str]]:
    """Sites that differ in their layer alone share a line, with their sums; the last line is all of them."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((re.sub(r"\d+", "*", row["site"]), row["method"], row["note"]), []).append(row)
    lines = []
    for (site, method, note), same in groups.items():
        name = same[0]["site"] if len(same) == 1 else f"{len(same)} x {site}"
        said = f"{name}\n  {method}: {note}" if note else f"{name}\n  {method}"
        lines.append([said, *_cells({key: sum(row[key] for row in same) for key in totals})])
    return [*lines, ["all of these", *_cells(totals)]]


def _cells(sums: Mapping[str, float]) -> list[str]:
    return [
        f"{sums['mflop_before']:,.2f} → {sums['mflop_after']:,.2f}",
        f"{sums['saved_before']:,.0f} → {sums['saved_after']:,.0f}",
        f"{sums['added_params']:,}",
    ]


def methods(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Methods; all if none is given.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Explain the sparse methods: what each does, every key of --method NAME:KEY=VALUE, and its default.

    \b
    Example:
      sparsetrain methods routed_ffn
    """
    import sparsetrain.methods  # noqa: F401  (enters them in the registry)
    from sparsetrain.core.config import method_config, registered_methods
    from sparsetrain.recipes.entries import written_defaults

    kinds = [method_config(name) for name in names or registered_methods()]
    data, show = {}, []
    for kind in kinds:
        data[kind.method] = {
            "help": inspect.getdoc(kind),
            "keys": {k: v for k, v in kind().to_dict().items() if k != "method"},
        }
        common = "Every method also takes layers=0|2|5-9 (blocks, from 0) and targets=PATTERN|PATTERN (on site names)."
        show += [f"{kind.method}\n", inspect.getdoc(kind), f"\nDefaults: {written_defaults(kind)}\n{common}\n"]
    return Answer(data={"methods": data}, show=show)


def _recipe(file: Any, given: dict[str, Any]) -> Any:
    from sparsetrain.recipes.finetune import Recipe

    # a recipe must name its data, which a plan does not read
    return Recipe.from_yaml(file, given) if file else Recipe.from_values({"data": "not read", **given})
