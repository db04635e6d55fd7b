"""The protocol of checkpoints, which survive a kill at any moment.

A folder is ours by its mark, which is written before anything else is, or by its manifest; others are never touched. A
checkpoint is whole once its manifest is written, which comes last; one without was interrupted and is passed over. Old
checkpoints go only after the new manifest is on the disk, so at every moment one whole checkpoint exists (once there
was a first).
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsetrain.core.errors import CheckpointError, NotFinite
from sparsetrain.core.files import is_scratch
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.runs.events import Report, silent
from sparsetrain.runs.finite import not_finite
from sparsetrain.runs.layout import PROGRESS, RESULT, RUN
from sparsetrain.runs.lock import LOCK
from sparsetrain.runs.manifest import FORMAT, MANIFEST, json_in, read_json, verify_manifest, write_json, write_manifest
from sparsetrain.runs.places import check_folder

MARK = "sparsetrain.json"
"""In each checkpoint: the recipe that it is of."""


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


def about_recipe(recipe: RunRecipe) -> dict[str, Any]:
    """What a mark says of a recipe, for `check_recipe` of a later run."""
    return {"format": FORMAT, "fingerprint": recipe.fingerprint(), "training_values": recipe.training_values()}


def check_recipe(path: Path, about: dict[str, Any], recipe: RunRecipe) -> None:
    """Raise CheckpointError, with the keys, if what is there was written by another recipe."""
    if about["fingerprint"] != recipe.fingerprint():
        values = about.get("training_values")
        differences = "; ".join(recipe.differences(values if isinstance(values, dict) else {}))
        raise CheckpointError(
            f"{path} was written by another recipe ({differences}). Resume with the recipe it was started with, or "
            "choose another output."
        )


def begin_checkpoint(folder: Path, recipe: RunRecipe) -> None:
    """Mark a checkpoint folder as ours, before anything is written into it.

    Raises:
        CheckpointError: something else is there.
    """
    if folder.is_symlink() or folder.exists():
        if mark_of(folder) is None:
            raise CheckpointError(f"{folder} appeared during the run, and is not of it. Move it away, then --resume.")
        (folder / MANIFEST).unlink(missing_ok=True)  # not whole until it is written again
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / MARK, about_recipe(recipe))


def complete_checkpoint(folder: Path, step: int, **entries: Any) -> None:
    """Write the manifest, which makes a checkpoint whole.

    Raises:
        NotFinite: it holds infinities or no numbers; it is removed.
    """
    if (found := not_finite(folder)) is not None:
        shutil.rmtree(folder)
        raise NotFinite(
            f"{found} after step {step}: training has diverged. Lower --lr, or add --warmup-steps. "
            f"{last_good(folder.parent)}"
        )
    write_manifest(folder, step=step, **entries)


def last_good(output: str | Path) -> str:
    """A sentence that names the newest whole checkpoint."""
    whole = [path for path in own_checkpoints(output) if (path / MANIFEST).is_file()]
    return f"The last good checkpoint is {whole[-1]}." if whole else "No checkpoint was written before."


def rotate(output: str | Path, keep: int, kept_step: int | None = None) -> None:
    """Remove all but the newest `keep` whole checkpoints and that of `kept_step`; each loses its manifest first, so
    none is ever half there."""
    whole = [path for path in own_checkpoints(output) if (path / MANIFEST).is_file()]
    for path in (path for path in whole[:-keep] if _step_of(path) != kept_step):
        (path / MANIFEST).unlink()
        shutil.rmtree(path)


def clear_interrupted(output: str | Path) -> None:
    """Remove checkpoints that were never finished, before a continued run writes into the same folders."""
    for path in checkpoints(output):
        if _is_bare(path) or (mark_of(path) is not None and not (path / MANIFEST).is_file()):
            shutil.rmtree(path)


def checkpoints(output: str | Path) -> list[Path]:
    """The checkpoint folders in an output, whole or not, oldest first."""
    return sorted((path for path in _named(output) if path.is_dir()), key=_step_of)


def own_checkpoints(output: str | Path) -> list[Path]:
    """Those that a run of ours wrote, oldest first."""
    return [path for path in checkpoints(output) if mark_of(path) is not None]


def foreign_checkpoints(output: str | Path) -> list[Path]:
    """What has a checkpoint's name and is not of a run of ours, oldest first."""
    return sorted((path for path in _named(output) if mark_of(path) is None and not _is_bare(path)), key=_step_of)


def _is_bare(path: Path) -> bool:
    """Is it a folder that a run was stopped in before its mark stood there? Nobody loses anything with it."""
    return path.is_dir() and not path.is_symlink() and all(is_scratch(held.name) for held in path.iterdir())


def mark_of(path: Path) -> dict[str, Any] | None:
    """What a checkpoint of ours says of its recipe; None for any other folder, for a link, and for a file."""
    if path.is_symlink() or not path.is_dir():
        return None
    for name in (MARK, MANIFEST):
        about = json_in(path / name)
        if isinstance(about, dict) and isinstance(about.get("fingerprint"), str) and "format" in about:
            return about
    return None


def find_resumable(output: str | Path, recipe: RunRecipe, report: Report = silent) -> Checkpoint | None:
    """The newest whole checkpoint of a run; None, with a note, if it was stopped before its first was whole.

    Interrupted checkpoints are passed over with a note. A checkpoint that was whole and is damaged now is an error, and
    so is one of another recipe.

    Raises:
        CheckpointError: a damaged file (named); another recipe (its keys named).
    """
    output = Path(output)
    for path in reversed(own_checkpoints(output)):
        if (about := mark_of(path)) is not None:
            check_recipe(path, about, recipe)
        if not (path / MANIFEST).is_file():
            report({"event": "note", "text": f"{path} was interrupted while it was written; passing over it."})
            continue
        return _whole(path, recipe)
    report({"event": "note", "text": f"{output} holds no whole checkpoint; starting from the beginning."})
    return None


def _whole(path: Path, recipe: RunRecipe) -> Checkpoint:
    try:
        manifest = verify_manifest(path)
        progress = read_json(path / PROGRESS)
        if (found := not_finite(path)) is not None:
            raise CheckpointError(f"{found}: training had diverged.")
        if not isinstance(step := manifest.get("step"), int) or not isinstance(data := manifest.get("data"), str):
            raise CheckpointError(f"{path / MANIFEST} does not say which step and data it is of.")
    except CheckpointError as error:
        raise CheckpointError(f"{error} Remove {path} to resume from the checkpoint before it.") from None
    check_recipe(path, manifest, recipe)
    return Checkpoint(path=path, step=step, progress=progress, data=data, stage=manifest.get("stage", 0))


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
    held = held_in(output)
    if not held:  # trying it touches the folder, and what is held may be someone else's
        check_folder(output, "output")
    if held and not resume:
        shown = ", ".join(held[:4]) + (", …" if len(held) > 4 else "")
        begun = RUN in held or bool(own_checkpoints(output))
        advice = "Add --resume, or choose another." if begun and RESULT not in held else "Choose another."
        raise ValueError(f"output folder {output} is not empty (it holds {shown}). {advice}")


def held_in(output: Path) -> list[str]:
    """What is in a folder, but for locks and what is half-done."""
    found = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    return [name for name in found if name != LOCK and not is_scratch(name)]


def _named(output: str | Path) -> list[Path]:
    return [path for path in Path(output).glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]+", path.name)]


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])
