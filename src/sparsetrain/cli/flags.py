"""The recipe's keys as flags: one row a key. `takes` gives a command the rows it names.

Values are passed on as text and read by the recipe, so a flag and a line of a recipe file get the same error.
A flag that is not given is None: the recipe file, then the recipe's own default decides. The defaults printed here
are compared with the recipe's by a test; importing the recipe itself would cost `--help` a second.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsetrain.recipes.tasks import offered, says

MAIN, LENGTH, SPARSE, TRAIN, KEEP, MACHINE = (
    "Model and data",
    "Length of the run",
    "Sparsity",
    "LoRA and optimizer",
    "Checkpoints and evaluation",
    "Machine",
)

PRESETS_HELP = (
    "[bold]Presets[/]  [cyan]auto[/]: what pays for this data, model and machine, often plain LoRA. "
    "[cyan]spt[/]: attention and FFN, fitted to the model. [cyan]spt-paper[/]: the published "
    "choices, which start far from the pretrained model. [cyan]tokens[/]: gradient through some tokens alone. "
    "[cyan]spt+tokens[/]: all of them. [cyan]dense[/]: plain LoRA, what to beat."
)


def methods_help() -> str:
    """Every method of the registry, as `--help` shows it."""
    import sparsetrain.methods  # noqa: F401  (enters them in the registry)
    from sparsetrain.core.config import registered_methods

    head = "[bold]Methods[/] (every key of one: `sparsetrain methods NAME`)"
    return "\n\n".join([head, *(f"[cyan]{name}[/]  {kind.about}" for name, kind in registered_methods().items())])


@dataclass(frozen=True)
class Flag:
    """key: the recipe's key. metavar: choices, or the kind of value. default: as printed. kind: as typer gives it."""

    key: str
    metavar: str
    default: str
    panel: str
    help: str
    kind: Any = str
    name: str = ""

    def parameter(self) -> inspect.Parameter:
        spelled = self.name or "--" + self.key.replace("_", "-")
        if self.kind is bool:
            spelled += f"/--no-{spelled[2:]}"
        option = typer.Option(
            spelled,
            help=self.help,
            show_default=self.default or False,
            rich_help_panel=self.panel,
            metavar=self.metavar or None,
        )
        annotation = Annotated[self.kind | None, option]
        return inspect.Parameter(self.key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


INT, FLOAT = "INT", "FLOAT"
CHECKPOINTING = "Recompute activations in the backward pass: much less memory, about a third more time."
FLAGS: dict[str, Flag] = {
    flag.key: flag
    for flag in (
        Flag("model", "NAME|DIR", "", MAIN, "Embedded model (`sparsetrain models list`), local folder, or hub name."),
        Flag("model_revision", "NAME", "", MAIN, "Branch, tag or commit of a hub model."),
        Flag("trust_remote_code", "", "no", MAIN, "Run Python code that comes with the model. Read it before.", bool),
        Flag("data", "NAME|PATH", "", MAIN, "Text file, folder or glob; JSONL or a JSON array (text, messages, "
             "prompt/completion, or instruction/output); CSV; Parquet; texts also .gz; an embedded set; a hub name."),
        Flag("eval_data", "NAME|PATH", "", MAIN, "Held-out data of its own; a share of --data if not given."),
        Flag("dataset_config", "NAME", "", MAIN, "Subset of a hub data set."),
        Flag("dataset_train_split", "NAME", "train", MAIN, "Split that is trained on."),
        Flag("dataset_test_split", "NAME", "", MAIN, "Split that is held out; a share of the other if not given."),
        Flag("dataset_revision", "NAME", "", MAIN, "Branch, tag or commit of a hub data set."),
        Flag("streaming", "", "no", MAIN, "Read the data while it trains, for what is too large to hold; with --steps.",
             bool),
        Flag("stream_rows", INT, "1000", MAIN, "With --streaming: rows (documents of text) read ahead; the held-out "
             "part is of these."),
        Flag("task", "|".join(offered("finetune")), "lm", MAIN, says("finetune")),
        Flag("text_column", "NAME", "text", MAIN, "Column that holds the text, in JSONL, JSON and CSV."),
        Flag("chat_template_path", "FILE|NAME", "", MAIN, "sft: chat template in place of the tokenizer's: a Jinja "
             "file, a model that has it, or its text."),
        Flag("holdout", "tokens|documents", "tokens", MAIN, "What the held-out part of text is a share of. tokens: a "
             "long document among short ones is cut in two, its end held out. documents: they stay whole."),
        Flag("output", "DIR", "runs/finetune", MAIN, "Folder for checkpoints, the trained model and the report. "
             "Must be absent or empty, unless --resume."),
        Flag("seq_len", INT, "1024", LENGTH, "Tokens in a sequence; at most the model's context."),
        Flag("packing", "", "no", LENGTH, "sft: several examples in a row, none of which sees another. lm, which "
             "packs in any case: no document sees another.", bool),
        Flag("batch_size", INT, "1", LENGTH, "Sequences in one pass. Memory grows with it."),
        Flag("grad_accum", INT, "1", LENGTH, "Passes added up for one step. Effective batch: batch-size x grad-accum."),
        Flag("steps", INT, "200", LENGTH, "Optimizer steps."),
        Flag("epochs", FLOAT, "", LENGTH, "Passes over the data, instead of --steps."),
        Flag("preset", "auto|spt|spt-paper|tokens|spt+tokens|dense", "auto", SPARSE, "A ready set of methods. auto: "
             "whatever was seen to pay for such data, and is fastest here."),
        Flag("methods", "NAME:KEY=VALUE,...", "", SPARSE, "A sparse method; repeat for several. Given without "
             "--preset, it replaces the default one.", list[str], "--method"),
        Flag("calibration_tokens", INT, "8192", SPARSE, "Training tokens that the conversion is fitted on."),
        Flag("deploy", "dense|sparse", "dense", SPARSE, "How the trained model is used. dense: sparsity makes training "
             "cheaper, and what is saved is a plain adapter of the plain model. sparse: it runs as it was trained."),
        Flag("dense_first", FLOAT, "", SPARSE, "With deploy dense: share of the steps that train dense at the start "
             "(0.05, or 0 for methods that change gradients alone)."),
        Flag("dense_last", FLOAT, "", SPARSE, "The same at the end (0.2, or 0)."),
        Flag("train_auxiliary", "", "no", SPARSE, "With deploy dense: train routers and codebooks too.", bool),
        Flag("distill_steps", INT, "0", SPARSE, "Steps in which each routed FFN learns its dense FFN's output before "
             "training."),
        Flag("distill_lr", FLOAT, "0.0003", SPARSE, "Learning rate of the distillation."),
        Flag("compare", "none|dense", "none", SPARSE, "dense: also train dense LoRA, step by step beside, and report "
             "who won where. Takes twice the time."),
        Flag("lora_r", INT, "16", TRAIN, "Rank of LoRA; 0 trains all weights."),
        Flag("lora_alpha", FLOAT, "16.0", TRAIN, "LoRA's update is scaled by alpha / r."),
        Flag("lora_targets", "NAMES", "all-linear", TRAIN, "Linears that get LoRA: all-linear, or names such as "
             "q_proj,v_proj."),
        Flag("lora_dtype", "fp32|bf16", "fp32", TRAIN, "Format of LoRA's factors. bf16: less memory, small steps are "
             "rounded away."),
        Flag("lr", FLOAT, "0.0002", TRAIN, "Peak learning rate; about a tenth of it without LoRA."),
        Flag("lr_schedule", "linear|cosine|constant", "cosine", TRAIN, "How it falls after the warm-up."),
        Flag("warmup_steps", FLOAT, "0", TRAIN, "Steps in which it rises from 0; below 1: their share of all."),
        Flag("weight_decay", FLOAT, "0.0", TRAIN, "AdamW's decoupled decay."),
        Flag("max_grad_norm", FLOAT, "1.0", TRAIN, "Longer gradients are scaled down to this; 0: no clipping."),
        Flag("ema_decay", FLOAT, "", TRAIN, "Decay of the average of the weights that is evaluated, sampled from and "
             "saved (0.999 for diffusion, else 0: none)."),
        Flag("save_every", INT, "50", KEEP, "Steps between checkpoints; 0: the final model only."),
        Flag("keep_checkpoints", INT, "2", KEEP, "Newest checkpoints kept."),
        Flag("eval_every", INT, "0", KEEP, "Steps between evaluations; 0: before and after training only."),
        Flag("eval_tokens", INT, "16384", KEEP, "Held-out tokens an evaluation."),
        Flag("early_stopping", INT, "0", KEEP, "Evaluations without a new lowest held-out loss before it ends; "
             "0: never."),
        Flag("load_best_model_at_end", "", "no", KEEP, "End with the weights of the best evaluation; with "
             "--eval-every.", bool),
        Flag("metric_for_best_model", "NAME", "loss", KEEP, "What is best by: loss, or the task's metric (accuracy, "
             "perplexity)."),
        Flag("greater_is_better", "", "", KEEP, "Its direction, where it is not the metric's own.", bool),
        Flag("resume", "", "no", KEEP, "Go on from the newest whole checkpoint in --output.", bool),
        Flag("seed", INT, "0", MACHINE, "Same seed, same machine: same losses."),
        Flag("dtype", "auto|fp32|bf16", "auto", MACHINE, "auto is bf16 where this machine multiplies it 1.3x faster, "
             "else fp32; SPARSETRAIN_DTYPE says what auto takes instead."),
        Flag("load_in_4bit", "", "no", MACHINE, "Hold the frozen weights in 4 bits (QLoRA; needs bitsandbytes).", bool),
        Flag("load_in_8bit", "", "no", MACHINE, "Hold them in 8 bits (LLM.int8; needs bitsandbytes).", bool),
        Flag("gradient_checkpointing", "none|non-reentrant|reentrant", "none", MACHINE, CHECKPOINTING),
        Flag("activation_offloading", "", "no", MACHINE, "With gradient checkpointing: blocks' inputs wait in the "
             "CPU's memory. Exact; slower by the copies.", bool),
        Flag("tiled_mlp", INT, "1", MACHINE, "Pieces of a row in which each FFN runs, for very long rows. Exact; one "
             "more forward of the FFNs."),
        Flag("device", "auto|cpu|mps|cuda|cuda:N", "auto", MACHINE, "auto takes a GPU if there is one."),
        Flag("threads", INT, "all cores", MACHINE, "CPU threads."),
    )
}  # fmt: skip

RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="FILE.yaml", help="Recipe file; flags win over it.", rich_help_panel=MAIN),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result, or the error, as one JSON document on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error. Also: SPARSETRAIN_DEBUG=1.")]


_PRESET = replace(FLAGS["preset"], metavar="spt|spt-paper|tokens|spt+tokens|dense", default="spt")
STUDY_FLAGS = FLAGS | {"preset": replace(_PRESET, help="A ready set of methods.")}
"""Of the commands that look into methods: there is no run that could choose."""


def takes(*keys: str, table: dict[str, Flag] = FLAGS) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Replace the `**flags` of a command by the flags of `keys`, in the order of the table."""

    def edit(command: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        rows = [table[key].parameter() for key in table if key in keys]
        command.__signature__ = signature.replace(parameters=[*rows, *own])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in [*rows, *own]}
        return command

    return edit


def changes(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given, as recipe entries.

    Two pairs are one choice each, so that a flag replaces both of the file's: steps or epochs, preset or methods.
    """
    given = {key: value for key, value in flags.items() if value is not None and value != []}
    for one, other in (("steps", "epochs"), ("preset", "methods")):
        if (one in given) != (other in given):
            given[other if one in given else one] = None
    return given


def studied(recipe: Any, flags: dict[str, Any]) -> Any:
    """The recipe of a command that looks into methods, with the preset of `STUDY_FLAGS` where none is named.

    Raises:
        ValueError: --preset auto was given.
    """
    from sparsetrain.recipes.presets import PRESETS, STUDIED_PRESET

    if flags.get("preset") == "auto":
        raise ValueError("--preset auto chooses when finetune begins, and nothing is trained here. Give another.")
    return recipe if recipe.preset is None else recipe.decided(PRESETS[STUDIED_PRESET])
