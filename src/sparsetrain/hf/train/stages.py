"""A run's stages: how one begins with what the stage before has left.

The Trainer of a stage counts the steps of the whole run, over the rows and the learning rates of the whole run, and is
stopped at the stage's end, where a checkpoint is always written. The next stage begins by translating that checkpoint
(weights, optimizer state) for its own model, and its Trainer goes on from the translation as from any checkpoint. So
it makes no difference whether a run was interrupted between two stages.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, get_scheduler

from sparsetrain.core import ranks
from sparsetrain.hf.train.callbacks import restart_schedule
from sparsetrain.hf.train.checkpoint import own_names, plain_states
from sparsetrain.hf.train.journal import Journal
from sparsetrain.hf.train.parts import Parts
from sparsetrain.runs.kept import KeptWeights
from sparsetrain.runs.layout import ENTERING, KEPT
from sparsetrain.runs.manifest import disk_errors
from sparsetrain.runs.spans import Span
from sparsetrain.surgery.apply import Handle
from sparsetrain.surgery.grow import carried_state
from sparsetrain.surgery.method import Grown, Weights
from sparsetrain.surgery.site import Site

Enter = Callable[[Parts, Journal, int, Any, MutableMapping[str, Weights]], tuple[Grown, Handle | None]]
"""(parts, journal, index of a stage, dense model of the stage before, kept weights) -> the stage's model, converted."""


class StageCallback(TrainerCallback):
    """Ends a stage at its last step with a checkpoint, and lets its learning rate run anew where that is asked."""

    def __init__(self, span: Span) -> None:
        self.span = span

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        scheduler, steps, stage, rewound = kwargs["lr_scheduler"], self.span.steps, self.span.stage, self.span.rewound
        factors, begins = scheduler.lr_lambdas, 0
        if stage.restart_lr:
            own: Any = get_scheduler(
                args.lr_scheduler_type,
                optimizer=torch.optim.SGD([torch.zeros(1)]),
                num_warmup_steps=args.get_warmup_steps(steps) if stage.warmup_steps is None else stage.warmup_steps,
                num_training_steps=steps,
                scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),  # type: ignore[arg-type]
            )
            factors, begins = own.lr_lambdas * len(factors), self.span.first
        elif rewound is not None:
            begins = max(0, rewound - args.get_warmup_steps(self.span.total))
        elif stage.lr_ratio == 1:
            return
        # by the factors and not by the base rates, which a checkpoint holds and the next stage would scale again
        scheduler.lr_lambdas = [lambda step, f=factor: stage.lr_ratio * f(step) for factor in factors]
        restart_schedule(scheduler, begins, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        leave_entry(Path(args.output_dir or "."))
        if state.global_step == self.span.last < self.span.total:
            control.should_save = control.should_training_stop = True


def enter_stage(
    enter: Enter,
    span: Span,
    parts: Parts,
    journal: Journal,
    model: Any,
    handle: Handle | None,
    left: Path,
    arguments: TrainingArguments,
) -> tuple[Any, Handle | None, Path]:
    """Begin a stage: (its model, converted; the handle; a folder that its Trainer goes on from).

    Args:
        model, handle: of the stage before, with the weights of its last step. The handle is used up.
        left: the checkpoint of that step.
        arguments: of the Trainer.
    """
    output = Path(parts.recipe.output)
    with disk_errors(output), plain_states(left):
        old_names = _optimizer_names(Trainer(model=model, args=arguments))
        moved = _restored(model, handle)
        grown, handle = enter(parts, journal, span.index, model, kept_weights(parts, journal))
        origins = {
            name: dataclasses.replace(origin, carry=origin.carry and moved.isdisjoint(origin.olds))
            for name, origin in grown.origins.items()
        }
        folder = output / ENTERING
        leave_entry(output)
        trainer = Trainer(model=grown.model, args=arguments)
        with own_names(grown.model):
            trainer.save_model(str(folder))
        grown, new_names = dataclasses.replace(grown, origins=origins), _optimizer_names(trainer)
        if ranks.is_first():
            _write_state(left, folder, lambda state: carried_state(state, old_names, new_names, grown))
        ranks.wait()
    return grown.model, handle, folder


def _write_state(left: Path, folder: Path, carried: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """What a Trainer goes on from beside weights: of the last checkpoint, its optimizer's state carried over."""
    for path in left.iterdir():
        if path.name in ("scheduler.pt", "trainer_state.json") or path.name.startswith("rng_state"):
            shutil.copyfile(path, folder / path.name)
    state = torch.load(left / "optimizer.pt", map_location="cpu", weights_only=True)
    torch.save(carried(state), folder / "optimizer.pt")


def kept_weights(parts: Parts, journal: Journal) -> KeptWeights:
    """What the run's growth method keeps; the journal knows the hashes."""
    return KeptWeights(Path(parts.recipe.output) / KEPT, journal.run.setdefault("kept", {}))


def leave_entry(output: Path) -> None:
    """Remove what a stage began with."""
    if ranks.is_first():
        shutil.rmtree(output / ENTERING, ignore_errors=True)


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Read a checkpoint's weights into its model, or into the adapter on it.

    Raises:
        ValueError: it lacks a parameter.
    """
    if isinstance(model, PeftModel):
        model.load_adapter(str(checkpoint), model.active_adapters[0], is_trainable=True)
        return
    found: Weights = {}
    for path in sorted(checkpoint.glob("model*.safetensors")):
        found |= load_file(str(path))
    model.load_state_dict(found, strict=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    there = {id(parameters[name]) for name in found if name in parameters}  # of tied ones, one is saved
    sites = {name: module for name, module in model.named_modules() if isinstance(module, Site)}
    # in no weights is what was added to a model that is deployed dense, and what comes with the checkpoint's state
    fixed = tuple(f"{name}." for name, module in sites.items() if module.deploys_dense)
    in_state = {f"{name}.{key}" for name, module in sites.items() for key in module.tensors()}
    apart = [name for name, p in parameters.items() if id(p) not in there and name not in in_state]
    lacking = [name for name in apart if not name.startswith(fixed)]
    if lacking:
        raise ValueError(f"{checkpoint} has no weights for {lacking[0]}, so it is of another model.")


def _optimizer_names(trainer: Trainer) -> list[list[str]]:
    """The names of the parameters in each group of a Trainer's optimizer, in its order."""
    model: Any = trainer.model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        [names[id(parameter)] for parameter in group["params"]] for group in trainer.create_optimizer().param_groups
    ]


def _restored(model: nn.Module, handle: Handle | None) -> set[str]:
    """Make a model dense again: names of the parameters whose entries have moved, so that their moments do not fit."""
    if handle is None:
        return set()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    handle.restore()
    after = dict(model.named_parameters())
    return {name for name, parameter in after.items() if name not in before or not torch.equal(parameter, before[name])}
