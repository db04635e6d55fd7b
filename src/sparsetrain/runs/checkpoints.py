"""The protocol of checkpoints, which survive a kill at any moment.

A checkpoint is whole once its manifest is written, which comes last; one without was interrupted and is passed over.
Old checkpoints go only after the new manifest is on the disk, so at every moment one whole checkpoint exists (once
there was a first).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetrain.core.errors import CheckpointError
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.runs.events import Report, silent
from sparsetrain.runs.layout import PROGRESS, RESULT
from sparsetrain.runs.manifest import MANIFEST, read_json, verify_manifest
from sparsetrain.runs.places import check_folder


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint. `progress` is what the run had recorded; `data` names the training rows it saw.

    stage: index of the stage that it was written in; at a stage's last step, the stage that ends there.
    """

    path: Path
    step: int
    progress: dict[str, Any]
    data: str
    stage: int = 0


def rotate(output: str | Path, keep: int) -> None:
    """Remove all but the newest `keep` whole checkpoints; each loses its manifest first, so none is ever half there."""
    whole = [path for path in checkpoints(output) if (path / MANIFEST).is_file()]
    for path in whole[:-keep]:
        (path / MANIFEST).unlink()
        shutil.rmtree(path)


def checkpoints(output: str | Path) -> list[Path]:
    """The checkpoint folders of a run, whole or not, oldest first."""
    found = [p for p in Path(output).glob("checkpoint-*") if p.is_dir() and p.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=_step_of)


def find_resumable(output: str | Path, recipe: RunRecipe, report: Report = silent) -> Checkpoint | None:
    """The newest whole checkpoint of a run; None, with a note, if it was stopped before its first was whole.

    Interrupted checkpoints are passed over with a note. A checkpoint that was whole and is damaged now is an error, and
    so is one of another recipe.

    Raises:
        CheckpointError: no run at all; a damaged file (named); another recipe (its keys named); a finished run.
    """
    output = Path(output)
    if (output / RESULT).is_file():
        raise CheckpointError(
            f"{output} holds a finished run ({RESULT}); nothing is left to resume. Choose another output."
        )
    for path in reversed(checkpoints(output)):
        if not (path / MANIFEST).is_file():
            report({"event": "note", "text": f"{path} was interrupted while it was written; passing over it."})
            continue
        return _whole(path, recipe)
    if not output.is_dir() or not any(output.iterdir()):
        raise CheckpointError(f"{output} holds no run, so there is nothing to resume. Start without --resume.")
    report({"event": "note", "text": f"{output} was stopped before its first checkpoint was whole; starting afresh."})
    return None


def _whole(path: Path, recipe: RunRecipe) -> Checkpoint:
    try:
        manifest = verify_manifest(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error} Remove {path} to resume from the checkpoint before it.") from None
    if manifest.get("fingerprint") != recipe.fingerprint():
        differences = "; ".join(recipe.differences(manifest.get("training_values", {})))
        raise CheckpointError(
            f"{path} was written by another recipe ({differences}). Resume with the recipe it was started with, or "
            "choose another output."
        )
    return Checkpoint(
        path=path,
        step=manifest["step"],
        progress=read_json(path / PROGRESS),
        data=manifest["data"],
        stage=manifest.get("stage", 0),
    )


def check_data(checkpoint: Checkpoint, data: str) -> None:
    """Raise CheckpointError if the training rows are not those the checkpoint saw: its place in them would be wrong."""
    if checkpoint.data != data:
        raise CheckpointError(
            f"{checkpoint.path} was trained on other rows: the data has changed since. Restore it, or choose another "
            "output and start again."
        )


def check_output(output: str | Path, *, resume: bool) -> None:
    """Raise ValueError if a new run would write into a folder that holds something, or cannot write there."""
    output = Path(output)
    check_folder(output, "output")
    held = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    if held and not resume:
        shown = ", ".join(held[:4]) + (", …" if len(held) > 4 else "")
        raise ValueError(f"output folder {output} is not empty (it holds {shown}). Add --resume, or choose another.")


def clear_interrupted(output: str | Path) -> None:
    """Remove checkpoints that were never finished, before a continued run writes into the same folders."""
    for path in checkpoints(output):
        if not (path / MANIFEST).is_file():
            shutil.rmtree(path)


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
