"""Going on from a checkpoint under any Trainer: its patterns, permutations and masks come back with its weights.

A Trainer loads weights and optimizer state and knows nothing else. What a conversion found is in the checkpoint's
sidecar, and the model at hand was converted anew, maybe from other rows: without this, trained weights would go on
under other patterns in silence.
"""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from sparsetrain.core.errors import CheckpointError
from sparsetrain.hf.model.saving import take_along
from sparsetrain.runs.layout import checkpoint_folder
from sparsetrain.runs.manifest import read_json
from sparsetrain.runs.sidecar import SIDECAR
from sparsetrain.surgery.apply import Handle


def continued(handle: Handle, args: TrainingArguments, state: TrainerState) -> list[str]:
    """Take over the state of the checkpoint that a run goes on from; a note where it was another.

    Raises:
        CheckpointError: it is of other methods, or nobody can say where it is and something depends on it.
    """
    named = args.resume_from_checkpoint
    places = [Path(named)] if isinstance(named, str) else []
    places.append(checkpoint_folder(args.output_dir, state.global_step))
    for folder in places:
        if _is_of(folder, state):
            return taken_from(handle, folder)
    if not any(handle.state().values()):
        return []
    raise CheckpointError(
        f"the run goes on from step {state.global_step}, and its checkpoint is not {places[-1]}: whether the patterns "
        "of this conversion are those of its weights cannot be told. Name the checkpoint in the arguments too: "
        "TrainingArguments(resume_from_checkpoint=…)."
    )


def taken_from(handle: Handle, folder: Path) -> list[str]:
    """Take over the state that was saved with the weights of a checkpoint; a note where it was another."""
    if not (folder / SIDECAR).is_file() and any(handle.state().values()):
        take_along(handle.model, folder)  # refuses weights that say they were trained sparse
        return [f"{folder} was saved by a dense model, so its weights run with the patterns of this conversion."]
    changed = take_along(handle.model, folder)
    if not changed:
        return []
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    return [f"Patterns, permutations and masks are those of {folder}, which its weights belong to: {changed[0]}{more}."]


def _is_of(folder: Path, state: TrainerState) -> bool:
    """Is this the checkpoint that a Trainer's state was read from? Its log says so."""
    if not (folder / TRAINER_STATE_NAME).is_file():
        return False
    found = read_json(folder / TRAINER_STATE_NAME)
    return (found.get("global_step"), found.get("log_history")) == (state.global_step, state.log_history)
