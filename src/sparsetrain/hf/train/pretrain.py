"""pretrain(): one recipe, from random weights to a saved model: data → config → weights → conversion → train → save.

What is shared with `finetune` is in `hf.run`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, MutableMapping
from itertools import islice
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from sparsetrain.hf.model import models
from sparsetrain.hf.model.architectures import (
    build_model,
    check_task,
    empty_model,
    fit_to_data,
    open_architecture,
    sequence_tokens,
    tokens_per_input,
)
from sparsetrain.hf.model.io import quiet
from sparsetrain.hf.train import assemble
from sparsetrain.hf.train.dtype import with_dtype
from sparsetrain.hf.train.held_out import KnownQuality, dense_start
from sparsetrain.hf.train.journal import Journal
from sparsetrain.hf.train.on_ranks import on_ranks
from sparsetrain.hf.train.parts import Parts
from sparsetrain.hf.train.passed import check_passed
from sparsetrain.hf.train.pretrain_data import load_rows, open_tokenizer
from sparsetrain.hf.train.rows import calibration_batches, reads_longest, refuse_rows
from sparsetrain.hf.train.run import Job, Result, run
from sparsetrain.hf.train.stages import kept_weights
from sparsetrain.planner.preview import StageForecast
from sparsetrain.recipes.pretrain import PretrainRecipe as PretrainRecipe
from sparsetrain.recipes.tasks import task_of
from sparsetrain.runs.checkpoints import Checkpoint
from sparsetrain.runs.events import Report, silent
from sparsetrain.runs.sidecar import read_state
from sparsetrain.runs.spans import ONE_STAGE
from sparsetrain.surgery.apply import Handle, sparsify
from sparsetrain.surgery.grow import enter, grown_in_stages, growth_method
from sparsetrain.surgery.method import Grown, Weights, edits_of, growth_of
from sparsetrain.surgery.plan import Plan


@quiet()
@on_ranks
def pretrain(
    recipe: PretrainRecipe,
    *,
    report: Report = silent,
    callbacks: Iterable[TrainerCallback] = (),
    like: PretrainRecipe | None = None,
    dense_quality: KnownQuality = None,
    write: bool = True,
    forecast: Callable[[PretrainRecipe, Parts], list[StageForecast]] | None = None,
) -> Result:
    """Train a model from random weights and write its output folder.

    `output` then holds `model/` with its sidecar, `checkpoint-N/`, `recipe.yaml`, `result.json` and, with `write`,
    `report.json` and `report.html`.

    Args:
        recipe: what to do; its `compare` is for `hf.compare`.
        report: told what happens, as it happens (events: see `runs.events`).
        callbacks: further callbacks of the Trainer, called before ours.
        like: a sparse recipe that this dense run is compared with; attention dropout is as there.
        dense_quality: of the untrained dense model, where another run has measured it on the same rows; a function is
            asked when it is needed.
        write: write the report.
        forecast: plans a run of several stages (`hf.study.stage_trace.planned_stages`), for the report to have what was
            planned beside what was measured.

    Raises:
        ValueError, PlanError: the recipe does not fit the architecture or the data; nothing was written.
        CheckpointError: `resume` without a checkpoint that can be continued.
        OSError: the disk is full; the last checkpoint is whole.
        RuntimeError: training diverged.
    """
    recipe, growth = with_dtype(recipe, report), growth_of(recipe.configs)
    job = Job(
        open_parts=lambda tell: open_parts(recipe, tell, like),
        build=_build,
        about=lambda parts: {"job": "pretrain", "task": recipe.task, "fingerprint": recipe.fingerprint()},
        title=title(recipe),
        saved="model",
        arguments=_arguments(recipe),
        callbacks=(ClipValue(recipe.clip_value),) if recipe.clip_value else (),
        stages=ONE_STAGE if growth is None else growth_method(growth).stages(growth),
        enter=_enter,
        forecast=None if forecast is None else lambda parts: forecast(recipe, parts),
    )
    return run(recipe, job, report=report, callbacks=callbacks, dense_quality=dense_quality, write=write)


def title(recipe: PretrainRecipe) -> str:
    """What is trained, in a line."""
    methods = " + ".join(config.method for config in recipe.configs) or "dense"
    length = "" if task_of(recipe.task).images else f", {recipe.seq_len} tokens"
    return f"{recipe.model} from random weights on {recipe.data} ({recipe.task}), {methods}{length}"


def open_parts(recipe: PretrainRecipe, report: Report, like: PretrainRecipe | None = None) -> Parts:
    """Config, data and plan, checked against each other; no weights are made.

    Raises:
        ValueError, PlanError: the recipe does not fit the machine, the architecture or the data.
    """
    device = assemble.pick_device(recipe)
    assemble.say_device(recipe, device, report)
    check_passed(recipe, device)
    refuse_rows(recipe)
    config = open_architecture(recipe)
    check_task(config, recipe)
    configs = (like or recipe).configs
    models.drop_attention_dropout(config, lambda: empty_model(config, recipe.task), configs, report)
    tokenizer = open_tokenizer(recipe)
    tokens = sequence_tokens(config, recipe)
    bundle = load_rows(recipe, tokenizer, config, report)
    fit_to_data(config, recipe, bundle, tokenizer)
    refuse_rows(recipe, bundle)
    planned = None
    for grown in stage_models(config, recipe) if recipe.methods else ():  # the last one is what comes out
        planned = assemble.plan_on(grown.model, recipe, device, tokens, grown.edits)
    _refuse_replaced(recipe, planned)
    return Parts(
        recipe=recipe,
        device=device,
        path="",
        config=config,
        plan=planned,
        tokenizer=tokenizer,
        bundle=bundle,
        tokens_per_input=tokens_per_input(config, recipe),
    )


def stage_models(config: Any, recipe: PretrainRecipe) -> list[Grown]:
    """The models that a recipe trains, one a stage, on the meta device, with what each stage installs in its own."""
    model, growth = empty_model(config, recipe.task), growth_of(recipe.configs)
    return [Grown(model=model)] if growth is None else list(grown_in_stages(model, growth, recipe.seed))


def _refuse_replaced(recipe: PretrainRecipe, planned: Plan | None) -> None:
    """Raise ValueError if a model is to grow whose dense weights a method has taken away."""
    growth = growth_of(recipe.configs)
    replacing = [edit.method for edit in planned.edits if edit.replaces] if planned is not None else []
    if growth is not None and replacing:
        raise ValueError(
            f"{growth.method!r} makes each model out of the dense weights of the one before, and {replacing[0]!r} "
            "trains others in their place. Leave one out."
        )


class ClipValue(TrainerCallback):
    """Cuts every entry of the gradient to [-limit, limit], after the clipping by norm; methods' decays come after."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        torch.nn.utils.clip_grad_value_(kwargs["model"].parameters(), self.limit)


def _arguments(recipe: PretrainRecipe) -> dict[str, Any]:
    found: dict[str, Any] = {"adam_beta1": recipe.beta1, "adam_beta2": recipe.beta2, "adam_epsilon": recipe.eps}
    if recipe.min_lr_ratio:
        found |= {
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": recipe.min_lr_ratio},
        }
    return found


def _build(
    parts: Parts[PretrainRecipe], journal: Journal, resumed: Checkpoint | None, dense_quality: KnownQuality
) -> tuple[Any, Handle | None]:
    """The model with random weights, converted; a continued run gets its methods' state from the checkpoint."""
    recipe = parts.recipe
    set_seed(recipe.seed)  # the same start for every recipe of the same seed
    model = build_model(parts.config, recipe.task).to(parts.device)
    growth, grown = growth_of(recipe.configs), Grown(model=model)
    if resumed is not None:
        if growth is not None:
            grown = next(islice(grown_in_stages(model, growth, recipe.seed), resumed.stage, None))
        edits = (*grown.edits, *edits_of(recipe.configs))
        state = read_state(resumed.path) if edits else None
        return grown.model, sparsify(grown.model, *edits, state=state, seed=recipe.seed) if edits else None
    if growth is not None:
        grown = enter(model, growth, 0, kept_weights(parts, journal), recipe.seed)
    known = dense_start(dense_quality, grown.model, parts, journal, "evaluating the untrained model")
    journal.quality("untrained", known, step=0)
    return grown.model, _converted(grown, parts, journal)


def _enter(
    parts: Parts[PretrainRecipe], journal: Journal, stage: int, model: Any, kept: MutableMapping[str, Weights]
) -> tuple[Grown, Handle | None]:
    """The model of a later stage, converted anew."""
    growth = growth_of(parts.recipe.configs)
    assert growth is not None
    grown = enter(model, growth, stage, kept, parts.recipe.seed)
    return grown, _converted(grown, parts, journal)


def _converted(grown: Grown, parts: Parts[PretrainRecipe], journal: Journal) -> Handle | None:
    recipe = parts.recipe
    edits = (*grown.edits, *edits_of(recipe.configs))
    if not edits:
        return None
    began = time.perf_counter()
    batches = _longest_rows(parts) if reads_longest(recipe) else calibration_batches(parts)
    handle = sparsify(grown.model, *edits, calibration=batches, seed=recipe.seed, progress=journal.phase)
    journal.run["setup_s"] = journal.run.get("setup_s", 0.0) + time.perf_counter() - began
    return handle


def _longest_rows(parts: Parts[PretrainRecipe]) -> list[dict[str, torch.Tensor]] | None:
    """As `calibration_batches`, of the longest rows, padded to `seq_len`.

    A pattern is cut from maps of these rows, and must reach as far as any row of the training.
    """
    recipe, rows, collate = parts.recipe, parts.bundle.train, parts.bundle.collate_fn
    lengths = [len(row) for row in rows["input_ids"]]
    wanted = min(len(rows), -(-recipe.calibration_tokens // recipe.seq_len))
    places = sorted(range(len(rows)), key=lambda i: -lengths[i])[:wanted]
    batches = []
    for start in range(0, wanted, recipe.batch_size):
        batch = collate([rows[i] for i in places[start : start + recipe.batch_size]])
        batches.append({name: _padded(tensor, recipe.seq_len) for name, tensor in batch.items() if name != "labels"})
    return [{name: tensor.to(parts.device) for name, tensor in batch.items()} for batch in batches] or None


def _padded(rows_bt: torch.Tensor, tokens: int) -> torch.Tensor:
    return torch.nn.functional.pad(rows_bt, (0, max(0, tokens - rows_bt.shape[1])))
