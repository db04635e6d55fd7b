"""Nothing is touched that no run of ours wrote: outputs of other programs, and of other runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sparsetrain.core.errors import CheckpointError, InUse
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.runs.checkpoints import begin_checkpoint, clear_interrupted, foreign_checkpoints, mark_of, rotate
from sparsetrain.runs.claim import check_claim, claimed, finish, replacing, writing_into
from sparsetrain.runs.layout import RUN
from sparsetrain.runs.lock import LOCK
from sparsetrain.runs.manifest import MANIFEST, atomic_folder, write_manifest
from tests.hf import runs


def resuming(folder: Path, **changes: Any) -> RunRecipe:
    return runs.recipe(folder, resume=True, **changes)


def content(folder: Path) -> dict[str, Any]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def begun(folder: Path, kind: str = "run", **changes: Any) -> Path:
    """An output as a kill in set-up leaves it."""
    output = folder / "out"
    with claimed(output, runs.recipe(folder, **changes), kind):
        record = (output / RUN).read_bytes()
    (output / RUN).write_bytes(record)
    return output


FOREIGN: dict[str, dict[str, str]] = {
    "a Trainer's checkpoints": {"checkpoint-500/trainer_state.json": "{}", "checkpoint-500/model.safetensors": "w"},
    "with a manifest of its own": {"checkpoint-5/manifest.json": '{"files": []}'},
    "with a broken manifest": {"checkpoint-5/manifest.json": "{"},
    "a Trainer's last model": {"config.json": "{}", "model.safetensors": "w", "training_args.bin": "a"},
    "notes": {"notes.txt": "dear diary"},
    "a folder called adapter": {"adapter/adapter_config.json": "{}"},
    "a recipe of another program": {"recipe.yaml": "eggs: 3"},
    "a result of another program": {"run.json": '{"score": 1}'},
}


@pytest.mark.parametrize("kind", ["run", "comparison"])
@pytest.mark.parametrize("what", list(FOREIGN))
def test_another_program_s_folder_is_refused_by_name(what: str, kind: str, tmp_path: Path) -> None:
    for name, text in FOREIGN[what].items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(text)
    before, time = content(tmp_path / "out"), os.stat(tmp_path / "out").st_mtime_ns
    with pytest.raises(CheckpointError, match=next(iter(FOREIGN[what])).split("/")[0]):
        claimed(tmp_path / "out", resuming(tmp_path), kind).__enter__()
    with pytest.raises(ValueError, match="not empty"):
        claimed(tmp_path / "out", runs.recipe(tmp_path), kind).__enter__()
    assert content(tmp_path / "out") == before and os.stat(tmp_path / "out").st_mtime_ns == time


@pytest.mark.parametrize("name", ["checkpoint-500/model.safetensors", "checkpoint-7", "adapter/x", "training_args.bin"])
def test_what_another_put_into_a_run_s_folder_is_refused_by_name(name: str, tmp_path: Path) -> None:
    output = begun(tmp_path)
    (output / name).parent.mkdir(exist_ok=True)
    (output / name).write_text("theirs")
    before = content(output)
    with pytest.raises(ValueError, match=name.split("/")[0]):
        claimed(output, resuming(tmp_path), "run").__enter__()
    assert content(output) == before


def test_a_linked_checkpoint_is_not_ours(tmp_path: Path) -> None:
    output = begun(tmp_path)
    begin_checkpoint(tmp_path / "elsewhere" / "checkpoint-2", runs.recipe(tmp_path))
    (output / "checkpoint-2").symlink_to(tmp_path / "elsewhere" / "checkpoint-2")
    with pytest.raises(CheckpointError, match="checkpoint-2 was not written by sparsetrain"):
        check_claim(output, resuming(tmp_path), "run")
    clear_interrupted(output)
    assert (output / "checkpoint-2").is_symlink() and mark_of(tmp_path / "elsewhere" / "checkpoint-2")


def test_foreign_checkpoints_are_neither_cleared_nor_rotated_nor_written_into(tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path)
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_text("w")
    (tmp_path / "checkpoint-4" / MANIFEST).write_text("{}")
    for step in (11, 12, 13):
        begin_checkpoint(tmp_path / f"checkpoint-{step}", recipe)
        write_manifest(tmp_path / f"checkpoint-{step}", step=step)
    begin_checkpoint(tmp_path / "checkpoint-14", recipe)
    clear_interrupted(tmp_path)
    rotate(tmp_path, 1)
    left = sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert left == [1, 2, 3, 4, 13]
    with pytest.raises(CheckpointError, match=r"checkpoint-3 appeared during the run"):
        begin_checkpoint(tmp_path / "checkpoint-3", recipe)


def test_another_recipe_or_kind_is_refused_before_the_first_checkpoint(tmp_path: Path) -> None:
    output = begun(tmp_path)
    with pytest.raises(CheckpointError, match=r"another recipe \(lr: 0\.01 there, 0\.5 here\)"):
        check_claim(output, resuming(tmp_path, lr=0.5), "run")
    with pytest.raises(CheckpointError, match=r"holds a run, and a comparison was asked.*Leave --compare out"):
        check_claim(output, resuming(tmp_path), "comparison")
    check_claim(output, resuming(tmp_path), "run")


def test_a_finished_comparison_has_nothing_to_resume_and_a_killed_report_has(tmp_path: Path) -> None:
    output, recipe = begun(tmp_path, "comparison"), resuming(tmp_path)
    (output / "report.json").write_text("{}")
    check_claim(output, recipe, "comparison")
    finish(output, recipe, "comparison")
    with pytest.raises(CheckpointError, match="holds a finished comparison"):
        check_claim(output, recipe, "comparison")


def test_two_starts_and_two_resumes_on_one_folder(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with claimed(output, runs.recipe(tmp_path)):
        for recipe in (runs.recipe(tmp_path), resuming(tmp_path), resuming(tmp_path, lr=0.5)):
            with pytest.raises(InUse, match=f"output folder .*out is in use by process {os.getpid()}"):
                claimed(output, recipe).__enter__()
        assert (output / LOCK).exists() and json.loads((output / RUN).read_text())["kind"] == "run"
    assert not (output / LOCK).exists()


def test_a_run_that_fails_before_a_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), claimed(tmp_path / "deep" / "out", runs.recipe(tmp_path)) as _:
        begin_checkpoint(tmp_path / "deep" / "out" / "checkpoint-2", runs.recipe(tmp_path))
        raise KeyboardInterrupt
    assert not (tmp_path / "deep").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt), claimed(tmp_path / "out", runs.recipe(tmp_path)):
        (tmp_path / "out" / "theirs").write_text("x")
        raise KeyboardInterrupt
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]


@pytest.mark.parametrize("holding", [writing_into, replacing])
def test_other_outputs_have_one_writer_too(holding: Any, tmp_path: Path) -> None:
    """Of `bench`, which adds files, and of `export`, which puts a whole folder in its place."""
    output = tmp_path / "deep" / "out"
    with pytest.raises(KeyboardInterrupt), holding(output):
        with pytest.raises(InUse, match=f"output folder .*out is in use by process {os.getpid()}"):
            holding(output).__enter__()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with holding(output):
        output.mkdir(exist_ok=True)
        (output / "bench.json").write_text("{}")
    assert [path.name for path in output.parent.rglob("*")] == ["out", "bench.json"]
    if holding is replacing:
        with pytest.raises(ValueError, match="not empty"):
            holding(output).__enter__()


@pytest.mark.parametrize("held", ["precious.txt", "manifest.json"])
def test_saving_replaces_no_folder_that_is_not_ours(held: str, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / held).write_text("{}")
    with (
        pytest.raises(ValueError, match="home is there already, and sparsetrain did not write it"),
        atomic_folder(tmp_path / "home"),
    ):
        pytest.fail("nothing is to be written")
    assert content(tmp_path / "home") == {str(tmp_path / "home" / held): b"{}"}


def test_saving_replaces_one_of_ours_through_a_link_and_keeps_the_link(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "disk" / "model") as scratch:
            (scratch / "weights").write_text(text)
            write_manifest(scratch)
        if text == "old":
            (tmp_path / "model").symlink_to(tmp_path / "disk" / "model")
    with atomic_folder(tmp_path / "model") as scratch:
        (scratch / "weights").write_text("newest")
        write_manifest(scratch)
    assert (tmp_path / "model").is_symlink() and (tmp_path / "model" / "weights").read_text() == "newest"
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["model"]


def test_a_checkpoint_s_folder_without_its_mark_is_begun_anew(tmp_path: Path) -> None:
    """Where a kill came between making the folder and marking it; one that holds anything is someone's."""
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-6").mkdir()
    (tmp_path / "checkpoint-6" / "notes.txt").write_text("mine")
    assert foreign_checkpoints(tmp_path) == [tmp_path / "checkpoint-6"]
    clear_interrupted(tmp_path)
    assert not (tmp_path / "checkpoint-4").exists() and (tmp_path / "checkpoint-6" / "notes.txt").exists()
