"""`sparsetrain eval`: the quality of any model on any data, by what its task is judged by."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsetrain.cli.answer import Answer
from sparsetrain.cli.flags import Debug, Json, changes, takes
from sparsetrain.cli.live import telling
from sparsetrain.core.metrics import METRICS
from sparsetrain.recipes.tasks import task_of

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Embedded model, hub name, a model's folder, or a run's --output.")
]
All = Annotated[bool, typer.Option("--all", help="Use every row, for data that was not trained on.")]


@takes(
    "trust_remote_code",
    "data",
    "task",
    "text_column",
    "holdout",
    "seq_len",
    "batch_size",
    "eval_tokens",
    "seed",
    "dtype",
    "load_in_4bit",
    "load_in_8bit",
    "device",
    "threads",
)
def evaluate(model: Model, all: All = False, json: Json = False, debug: Debug = False, **flags: Any) -> Answer:
    """Measure a model on data: perplexity (lm, sft) or accuracy (classify).

    Uses the rows that finetune holds out of the same data with the same --seed, so that a trained model is never
    measured on what it learnt; with --all, every row. Where MODEL is a run's --output, its own recipe.yaml stands in
    for flags that are not given: so an adapter trained on weights in 4 or 8 bits is measured on these;
    --no-load-in-4bit (8bit) measures it on the weights of the model's files, as it is exported.

    \b
    Examples:
      sparsetrain eval smollm2-135m --data python-stdlib
      sparsetrain eval runs/finetune
      sparsetrain eval runs/finetune --data my-test-set.txt --all
    """
    import torch

    from sparsetrain.hf.model.four_bit import held_bits
    from sparsetrain.hf.model.io import load, sidecar_of
    from sparsetrain.hf.train.assemble import autocasts, pick_device, pick_dtype
    from sparsetrain.hf.train.dtype import with_dtype
    from sparsetrain.hf.train.evaluate import evaluate as evaluate_rows
    from sparsetrain.hf.train.evaluate import held_out_tokens

    recipe = _pretraining(model, changes(flags)) or _recipe(model, changes(flags))
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    device = pick_device(recipe)
    with telling() as tell:
        recipe = with_dtype(recipe, tell)
        held = held_bits(model, sidecar_of(model), flags, device)
        options = {"trust_remote_code": bool(flags["trust_remote_code"]), "bits": held}
        loaded = load(model, dtype=pick_dtype(recipe, device), device=device, **options)
        recipe = recipe.model_copy(update={"task": flags["task"] or loaded.task})
        rows, bundle = _rows(recipe, loaded, all, tell)
        quality = evaluate_rows(
            loaded.model,
            rows,
            bundle.collate_fn,
            task=recipe.task,
            batch_size=recipe.batch_size,
            max_tokens=held_out_tokens(recipe),
            autocast=autocasts(recipe, device),
            progress=lambda share: tell({"event": "phase", "name": "evaluating", "share": share}),
        )
    part = "all" if all else "held-out"
    about = {"model": model, "data": recipe.data, "part": part, "task": recipe.task, "sparse": bool(loaded.handle)}
    about |= {f"load_in_{held}bit": True} if held else {}
    value = METRICS[quality.metric].text(quality.value)
    rows_text = f"{quality.rows:,} {'' if all else 'held-out '}rows"
    line = f"{quality.metric} {value} on {rows_text} of {recipe.data} ({quality.tokens:,} tokens)"
    line += f", on weights in {held} bits" if held else ""
    return Answer(data={**about, **quality.to_dict()}, show=[line])


def _recipe(model: str, given: dict[str, Any]) -> Any:
    """What to measure on: the run's own recipe under the flags, without its training."""
    from sparsetrain.recipes.finetune import Recipe

    # one step, since only held-out rows are read; no methods, since the model brings its own
    training = {"steps": 1, "epochs": None, "warmup_steps": 0, "methods": [], "preset": None, "compare": "none"}
    training |= {"chat_template_path": None}  # it is in the tokenizer that was saved
    values = {**given, **training, "model": model}
    if given.get("data") is not None:  # then what the run held out is not asked for
        values |= {
            "eval_data": None,
            "dataset_config": None,
            "dataset_train_split": "train",
            "dataset_test_split": None,
            "dataset_revision": None,
            "streaming": False,
            "stream_rows": Recipe.model_fields["stream_rows"].default,
        }
    run = Path(model) / "recipe.yaml"
    if run.is_file():
        return Recipe.from_yaml(run, values)
    if "data" not in given:
        raise ValueError(_without_recipe(model))
    return Recipe.from_values(values)


def _without_recipe(model: str) -> str:
    """What is missing where neither a run nor --data says what to measure on."""
    from sparsetrain.core.quote import quoted
    from sparsetrain.hf.assets import embedded_name

    shown = quoted(model)
    if os.path.lexists(model):
        return (
            f"{shown} is there, and has no recipe.yaml as a run has, so nothing says what to measure on. Give --data."
        )
    if embedded_name(model) is not None:
        return f"{shown} is an embedded model, and nothing says what to measure it on. Give --data."
    return (
        f"{shown} is not there: no run or folder of that name, and no embedded model. Correct the name; or give "
        "--data, if it is a model of the hub."
    )


def _pretraining(model: str, given: dict[str, Any]) -> Any:
    """The recipe of a pretrained run under the flags; None for any other model."""
    from sparsetrain.hf.model.io import sidecar_of
    from sparsetrain.hf.train.pretrain import PretrainRecipe

    run = Path(model) / "recipe.yaml"
    if not run.is_file() or sidecar_of(model).get("job") != "pretrain":
        return None
    return PretrainRecipe.from_yaml(run, {**given, "methods": [], "compare": "none"})


def _rows(recipe: Any, loaded: Any, every: bool, tell: Any) -> tuple[Any, Any]:
    """(rows to measure on, their bundle); a classifier's labels must be the data's, in the same order."""
    config = loaded.model.config
    bundle = _bundle(recipe, loaded, every, tell)
    if task_of(recipe.task).labelled:
        known = tuple(str(name) for _, name in sorted(config.id2label.items()))
        if known != bundle.label_names:
            raise ValueError(
                f"{recipe.data} has the labels {', '.join(bundle.label_names)}; {recipe.model} was trained on "
                f"{', '.join(known)}. Evaluate it on data with the same labels."
            )
    return bundle.train if every else bundle.eval, bundle


def _bundle(recipe: Any, loaded: Any, every: bool, tell: Any) -> Any:
    from sparsetrain.data.vocabulary import check_vocabulary
    from sparsetrain.hf.train.pretrain import PretrainRecipe
    from sparsetrain.hf.train.pretrain_data import held_out
    from sparsetrain.hf.train.rows import all_rows, load_rows

    if loaded.tokenizer is not None and not task_of(recipe.task).images:
        check_vocabulary(loaded.tokenizer, loaded.model.config, recipe.model)
    given = (recipe, loaded.tokenizer, loaded.model.config, tell)
    pretrained = isinstance(recipe, PretrainRecipe)
    images = task_of(recipe.task).images
    if loaded.tokenizer is None and every and (pretrained or images):
        raise ValueError(f"--all measures on text, and {recipe.data} is a task with a held-out part. Leave --all out.")
    if loaded.tokenizer is None and not pretrained and not images:
        raise ValueError(f"{recipe.model} has no tokenizer beside its weights. Save one into its folder.")
    if every:
        return all_rows(*given)
    return held_out(*given) if pretrained else load_rows(*given)
