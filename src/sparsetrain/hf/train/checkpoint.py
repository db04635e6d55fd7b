"""Completing transformers' own checkpoints.

The Trainer writes `checkpoint-N` (weights, optimizer, scheduler, random states). Before it, our callback marks the
folder as ours; after it, it adds the run's records and, last, the manifest (`runs.checkpoints` says what that means).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsetrain.core import ranks
from sparsetrain.core.errors import CheckpointError
from sparsetrain.core.plain_files import regular_file
from sparsetrain.core.quote import quoted
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.runs.best import kept_step
from sparsetrain.runs.card import CARD
from sparsetrain.runs.checkpoints import about_recipe, begin_checkpoint, complete_checkpoint, rotate
from sparsetrain.runs.events import Report, silent
from sparsetrain.runs.layout import PROGRESS, checkpoint_folder
from sparsetrain.runs.manifest import write_json
from sparsetrain.surgery.buckets import GradientBuckets


@contextmanager
def plain_states(checkpoint: Path | None) -> Iterator[None]:
    """Turn the refusal of a pickle (the Trainer reads its states as plain tensors alone) into one line.

    Raises:
        CheckpointError: a file of the checkpoint holds something else, which would run code, or is none of a run's.
    """
    for path in sorted(checkpoint.iterdir()) if checkpoint is not None else ():
        if path.suffix in (".pt", ".pth", ".bin", ".pkl") and not path.match("rng_state*.pth"):
            if path.name not in ("optimizer.pt", "scheduler.pt", "training_args.bin"):
                raise CheckpointError(f"{checkpoint} holds {quoted(path.name)}, which no run writes. Remove that file.")
            regular_file(path)
    try:
        yield
    except UnpicklingError:
        raise CheckpointError(
            f"{checkpoint} holds a file that is no plain state of an optimizer, schedule or random generator. Pickled "
            "code is never run; resume from a checkpoint that was written here."
        ) from None


@contextmanager
def own_names(model: Any) -> Iterator[None]:
    """Inside, a model is saved with its parameters named as it names them.

    transformers saves some families (ViT, mixtures of experts) under the names of its earlier versions, and its
    Trainer, which goes on from a checkpoint by those of the model, would leave what it does not find as it was drawn.
    `from_pretrained` reads both.
    """
    if not isinstance(model, PreTrainedModel):
        yield
        return
    vars(model)["save_pretrained"] = partial(type(model).save_pretrained, model, save_original_format=False)
    try:
        yield
    finally:
        del vars(model)["save_pretrained"]


class CheckpointCallback(TrainerCallback):
    """Completes each checkpoint with the run's records and its manifest, then removes the oldest ones.

    It must come after every callback that adds files to a checkpoint. On several ranks each writes the state of its
    random generators, and the first one all else, before and after them. Set the Trainer's `save_total_limit` to None.

    After each, DDP cuts its buckets anew, as it does in a run that goes on from there: where a gradient lies in a
    bucket decides in what order more than two ranks add theirs, and so its last bit.

    Args:
        recipe: whose fingerprint a continuation must have.
        data: `data_fingerprint` of the training rows.
        progress: (model, optimizer) -> what the run has recorded so far.
        place: step -> further entries of manifest and progress that say where in the run it is.
    """

    def __init__(
        self,
        recipe: RunRecipe,
        data: str,
        progress: Callable[[Any, Any], dict[str, Any]],
        report: Report = silent,
        place: Callable[[int], dict[str, Any]] = lambda _step: {},
    ) -> None:
        self.recipe, self.data, self.progress, self.report, self.place = recipe, data, progress, report, place

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.buckets = GradientBuckets(kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not control.should_save:
            return
        if ranks.is_first():  # now, before the Trainer writes
            begin_checkpoint(checkpoint_folder(args.output_dir, state.global_step), self.recipe)
        ranks.wait()

    on_log = on_step_end  # an evaluation asks for a checkpoint there

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        ranks.wait()  # for the files of the others
        self.buckets.rebuild()
        if not ranks.is_first():
            return
        folder = checkpoint_folder(args.output_dir, state.global_step)
        place = self.place(state.global_step)
        (folder / CARD).unlink(missing_ok=True)  # PEFT's, a form to be filled in that names a place on this machine
        recorded = self.progress(kwargs["model"], kwargs["optimizer"])
        write_json(folder / PROGRESS, recorded | place)
        complete_checkpoint(folder, state.global_step, **about_recipe(self.recipe), data=self.data, **place)
        rotate(folder.parent, self.recipe.keep_checkpoints, kept_step(self.recipe, recorded["run"].get("evals", [])))
        self.report({"event": "saved", "path": str(folder)})
