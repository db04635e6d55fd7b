"""A run's claim on its output folder: one process at a time, and nothing touched that no run of ours wrote.

The first file of a run says what the folder is of (`run.json`), before anything is loaded; so a run that is killed at
any moment can go on, or start again, and a folder without it is another's.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsetrain.core.errors import CheckpointError
from sparsetrain.core.files import sweep
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.runs.checkpoints import (
    about_recipe,
    check_output,
    check_recipe,
    clear_interrupted,
    foreign_checkpoints,
    held_in,
    own_checkpoints,
)
from sparsetrain.runs.layout import ADAPTER, CHOICE, ENTERING, KEPT, MODEL, RECIPE, REPORT_VALUES, RESULT, RUN, SIDES
from sparsetrain.runs.lock import LOCK, locked
from sparsetrain.runs.manifest import MANIFEST, json_in, refuse_foreign, write_json

_OF_A_TRAINER = (
    "trainer_state.json", "training_args.bin", "optimizer.pt", "scheduler.pt", "config.json", "adapter_config.json",
    "model.safetensors", "adapter_model.safetensors", "pytorch_model.bin",
)  # fmt: skip
"""What transformers' Trainer writes where a run of ours never does."""


@contextmanager
def claimed(
    output: str | Path, recipe: RunRecipe, kind: str = "run", choice: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Hold the output folder of a run, or of a comparison, until the block ends.

    A run that fails before there is anything to go on from leaves nothing behind.

    Args:
        kind: `run` or `comparison`.
        choice: what a new run chose before it began, to be kept there.

    Raises:
        ValueError: the folder is not empty, and the recipe does not resume.
        CheckpointError: to resume in a folder that holds what no run of ours wrote, or one of another recipe or kind.
        InUse: another process holds it.
        OSError: nothing can be written there.
    """
    output = Path(output)
    if not (output / LOCK).exists():  # else it was held by a run of ours, and may be now
        check_claim(output, recipe, kind)
    with _made(output), locked(output / LOCK, f"output folder {output}"):
        for folder in (output, output / KEPT):
            sweep(folder)
        check_claim(output, recipe, kind)
        begun = (output / RUN).is_file() or bool(own_checkpoints(output))
        if not (output / RUN).is_file():
            write_json(output / RUN, {"kind": kind, **about_recipe(recipe)})
            if choice is not None:
                write_json(output / CHOICE, choice)
        try:
            yield
        except BaseException:
            if not begun:
                _discard(output)
            raise


def check_claim(output: Path, recipe: RunRecipe, kind: str) -> None:
    """Raise, as `claimed` does, if a run may not write into a folder."""
    check_output(output, resume=recipe.resume)
    held = held_in(output)
    if not recipe.resume or not held:
        return
    about = json_in(output / RUN)
    if not isinstance(about, dict) or not isinstance(about.get("fingerprint"), str):
        about = {}
    if (name := _finished(output, about)) is not None:
        raise CheckpointError(f"{output} holds a finished {name}; nothing is left to resume. Choose another output.")
    if found := foreign_checkpoints(output):
        raise CheckpointError(
            f"{found[-1]} was not written by sparsetrain, so {output} is not touched. Resume in the output of a run of "
            "ours, or move the foreign checkpoints away."
        )
    of_trainer = [name for name in _OF_A_TRAINER if (output / name).exists()]
    if of_trainer or not (about or own_checkpoints(output) or (kind == "comparison" and _has_side(output))):
        shown = ", ".join(of_trainer or held[:4])
        raise CheckpointError(
            f"{output} holds {shown}, which no run of sparsetrain wrote, so there is nothing to resume, and nothing is "
            "touched. Choose another output."
        )
    for name in (ADAPTER, MODEL):
        refuse_foreign(output / name)
    if about:
        if (found_kind := about.get("kind")) != kind:
            other = "Add --compare dense." if found_kind == "comparison" else "Leave --compare out."
            raise CheckpointError(f"{output} holds a {found_kind}, and a {kind} was asked to go on there. {other}")
        check_recipe(output, about, recipe)


def finish(output: Path, recipe: RunRecipe, kind: str) -> None:
    """Mark a claimed folder as finished, once all of it is written."""
    write_json(output / RUN, {"kind": kind, **about_recipe(recipe), "finished": True})


def _finished(output: Path, about: dict[str, Any]) -> str | None:
    """What is finished in a folder; before there was `run.json`, its last file says so."""
    if about.get("kind") == "comparison":
        return "comparison" if about.get("finished") else None
    if (output / RESULT).is_file():
        return "run"
    return "comparison" if not about and (output / REPORT_VALUES).is_file() else None


def _has_side(output: Path) -> bool:
    return any((output / side / RUN).is_file() or own_checkpoints(output / side) for side in SIDES)


def _discard(output: Path) -> None:
    """Remove what a run has written, if there is nothing to go on from."""
    if any((path / MANIFEST).is_file() for path in own_checkpoints(output)) or (output / RESULT).is_file():
        return
    if any((output / name / MANIFEST).is_file() for name in (ADAPTER, MODEL)):
        return
    if any((output / side / RUN).is_file() for side in SIDES):
        return
    clear_interrupted(output)
    for name in (KEPT, ENTERING):
        shutil.rmtree(output / name, ignore_errors=True)
    for name in (RECIPE, RUN, CHOICE):
        (output / name).unlink(missing_ok=True)


@contextmanager
def writing_into(folder: str | Path) -> Iterator[None]:
    """Be the only process that writes files into a folder, which is made, until the block ends.

    Raises:
        InUse, OSError: as `claimed`.
    """
    folder = Path(folder)
    with _made(folder), locked(folder / LOCK, f"output folder {folder}"):
        sweep(folder)
        yield


@contextmanager
def replacing(folder: str | Path) -> Iterator[None]:
    """Be the only process that puts a whole folder in its place; the lock is beside it.

    Raises:
        ValueError: there is something in it.
        InUse, OSError: as `claimed`.
    """
    check_output(folder, resume=False)
    folder = Path(folder).resolve()
    with _made(folder.parent), locked(folder.parent / f".{folder.name}{LOCK}", f"output folder {folder}"):
        check_output(folder, resume=False)
        yield


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder, and remove those of its way that are empty at the end."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for place in new:
            with contextlib.suppress(OSError):  # something is in it
                place.rmdir()
