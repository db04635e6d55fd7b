"""Going on from a checkpoint under any Trainer: its patterns, permutations and masks come back with its weights.

A Trainer loads weights and optimizer state and knows nothing else. What a conversion found is in the checkpoint's
sidecar, and the model at hand was converted anew, maybe from other rows: without this, trained weights would go on
under other patterns in silence.
"""

from __future__ import annotations

from functools import cache, wraps
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

from sparsetrain.core.errors import CheckpointError
from sparsetrain.hf.model.saving import saved_configs, take_along
from sparsetrain.runs.layout import checkpoint_folder
from sparsetrain.surgery.apply import Handle

_READ_FROM = "_read_from"


@cache
def note_where_states_are_read() -> None:
    """Let a Trainer's state know, from now on in this process, the checkpoint that it was read from."""
    plain: Any = TrainerState.load_from_json.__func__  # type: ignore[attr-defined]

    @wraps(plain)
    def load_from_json(kind: type[TrainerState], json_path: str) -> TrainerState:
        state = plain(kind, json_path)
        vars(state)[_READ_FROM] = Path(json_path).parent
        return state

    TrainerState.load_from_json = classmethod(load_from_json)  # type: ignore[assignment]


def continued(handle: Handle, args: TrainingArguments, state: TrainerState) -> list[str]:
    """Take over the state of the checkpoint that a run goes on from; a note where it was another.

    Raises:
        CheckpointError: it is of other methods, or is not to be found and something depends on it.
    """
    folder = vars(state).get(_READ_FROM) or checkpoint_folder(args.output_dir, state.global_step)
    if folder.is_dir() or not any(handle.state().values()):
        return taken_from(handle, folder)
    raise CheckpointError(
        f"the run goes on from step {state.global_step}, and {folder} is not there: whether the patterns of this "
        "conversion are those of its weights cannot be told. Put the checkpoint back, or start again."
    )


def taken_from(handle: Handle, folder: Path) -> list[str]:
    """Take over the state that was saved with the weights of a checkpoint; a note where it was another."""
    if not saved_configs(folder) and any(handle.state().values()):
        return [f"{folder} was saved by a dense model, so its weights run with the patterns of this conversion."]
    changed = take_along(handle.model, folder)
    if not changed:
        return []
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    return [f"Patterns, permutations and masks are those of {folder}, which its weights belong to: {changed[0]}{more}."]
