"""Checkpoints: a run that was stopped anywhere goes on as if nothing had happened, or says why it cannot."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from sparsetrain.core.errors import CheckpointError
from sparsetrain.hf.train.finetune import Result, finetune
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.runs.checkpoints import MARK, begin_checkpoint, check_output, checkpoints, find_resumable, rotate
from sparsetrain.runs.manifest import MANIFEST, verify_manifest
from tests.hf import runs

KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "routed": {"methods": [runs.ROUTED]},
    "both methods": {"methods": [runs.CLUSTERED, runs.PQ]},
    "accumulating": {"methods": [runs.ROUTED], "batch_size": 1, "grad_accum": 2, "lr_schedule": "linear"},
    "all weights": {"methods": [runs.CLUSTERED], "lora_r": 0},
    "in the second epoch": {"epochs": 2.0, "batch_size": 16},
}


class StopAt(TrainerCallback):
    """Interrupts the run when `step` steps are done, before anything is saved for that step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def stopped(recipe: Recipe, step: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        finetune(recipe, callbacks=[StopAt(step)], write=False)


def resume(recipe: Recipe, **options: Any) -> Result:
    return finetune(recipe.model_copy(update={"resume": True}), write=False, **options)


def losses(result: Result) -> list[float | None]:
    return [row["loss"] for row in result.run["steps"]]


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_resumed_run_reproduces_the_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    whole = finetune(runs.recipe(tmp_path, output=str(tmp_path / "whole"), **KINDS[kind]), write=False)
    recipe = runs.recipe(tmp_path, output=str(tmp_path / "parts"), **KINDS[kind])
    steps = len(whole.run["steps"])
    stopped(recipe, steps // 2 + 2)
    again = resume(recipe)
    assert again.resumed_from in (steps // 2 + 1, steps // 2)
    assert losses(again) == losses(whole) and len(losses(whole)) == len(set(losses(whole)))
    assert again.run["evals"][-1]["loss"] == whole.run["evals"][-1]["loss"]
    for stage in ("dense", "after_conversion", "after_training"):
        assert again.run["perplexity"].get(stage) == whole.run["perplexity"].get(stage)
    for file in whole.saved.glob("*.safetensors"):
        one, other = load_file(file), load_file(again.saved / file.name)
        assert one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)


def test_the_same_recipe_gives_the_same_losses_and_another_seed_does_not(tmp_path: Path) -> None:
    first, same, other = (
        finetune(runs.recipe(tmp_path, output=str(tmp_path / name), methods=[runs.ROUTED], seed=seed), write=False)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert losses(first) == losses(same) and first.data_order == same.data_order
    assert losses(first) != losses(other)


def test_a_second_run_needs_resume_or_another_output(tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path)
    stopped(recipe, 3)
    with pytest.raises(ValueError, match=r"not empty.*checkpoint-2.*--resume"):
        finetune(recipe)


def test_only_the_newest_checkpoints_stay_and_each_is_whole(tmp_path: Path) -> None:
    finetune(runs.recipe(tmp_path, save_every=1, keep_checkpoints=3), write=False)
    found = checkpoints(tmp_path / "out")
    assert [path.name for path in found] == ["checkpoint-4", "checkpoint-5", "checkpoint-6"]
    for path in found:
        assert verify_manifest(path)["step"] == int(path.name[-1])


def test_rotation_never_counts_an_interrupted_checkpoint(tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path)
    for step in (1, 2, 3, 10):
        begin_checkpoint(tmp_path / f"checkpoint-{step}", recipe)
        if step != 10:
            (tmp_path / f"checkpoint-{step}" / MANIFEST).write_text("{}")
    (tmp_path / "checkpoint-3" / MARK).unlink()  # another's: not counted either
    rotate(tmp_path, 1)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3", "checkpoint-10"]


def test_an_interrupted_checkpoint_is_passed_over_with_a_note(tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path)
    stopped(recipe, 5)
    (tmp_path / "out" / "checkpoint-4" / MANIFEST).unlink()
    events: list[dict[str, Any]] = []
    again = resume(recipe, report=events.append)
    assert again.resumed_from == 2
    assert any("checkpoint-4 was interrupted" in event.get("text", "") for event in events)
    assert verify_manifest(tmp_path / "out" / "checkpoint-4")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "removed"])
def test_a_damaged_checkpoint_is_an_error_that_names_the_file(tmp_path: Path, name: str, damage: str) -> None:
    recipe = runs.recipe(tmp_path)
    stopped(recipe, 5)
    path = tmp_path / "out" / "checkpoint-4" / name
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[:-10])
    elif damage == "altered":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        path.unlink()
    before = sorted(p.name for p in (tmp_path / "out").rglob("*"))
    with pytest.raises(CheckpointError, match=f"{name}.*Remove .*checkpoint-4"):
        resume(recipe)
    assert sorted(p.name for p in (tmp_path / "out").rglob("*")) == before


def test_resuming_with_another_recipe_names_the_keys(tmp_path: Path) -> None:
    stopped(runs.recipe(tmp_path, methods=[runs.ROUTED]), 3)
    other = runs.recipe(tmp_path, methods=[runs.ROUTED | {"num_active": 3}], lr=5e-3)
    with pytest.raises(CheckpointError, match=r"lr: 0\.01 there, 0\.005 here.*num_active: 2 there, 3 here"):
        resume(other)


def test_keys_that_change_no_result_may_change(tmp_path: Path) -> None:
    stopped(runs.recipe(tmp_path), 3)
    again = resume(runs.recipe(tmp_path, save_every=3, keep_checkpoints=5, gradient_checkpointing="non-reentrant"))
    assert again.resumed_from == 2 and len(losses(again)) == 6


def test_resuming_on_changed_data_is_an_error(tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path)
    stopped(recipe, 3)
    runs.text(tmp_path / "text", seed=1)
    with pytest.raises(CheckpointError, match="the data has changed"):
        resume(recipe)


def test_a_finished_run_has_nothing_to_resume(tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path)
    finetune(recipe, write=False)
    with pytest.raises(CheckpointError, match="finished run"):
        resume(recipe)
    with pytest.raises(ValueError, match=r"result.json\)|…\)\. Choose another\."):
        check_output(recipe.output, resume=False)
    (Path(recipe.output) / "result.json").unlink()
    with pytest.raises(ValueError, match="Add --resume"):
        check_output(recipe.output, resume=False)
    with pytest.raises(ValueError, match="is a file"):
        check_output(tmp_path / "text" / "0.txt", resume=False)
    assert find_resumable(tmp_path / "absent", recipe) is None


_SERVER = """
import os, sys, torch
torch.set_num_threads(1)
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.recipes.finetune import Recipe
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        def tell(event):
            if event["event"] == "saved":
                print("saved", flush=True)
        finetune(Recipe.from_yaml(line.strip()), write=False, report=tell)
        os._exit(0)
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("over", flush=True)
"""
_ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    changes = {"methods": [runs.ROUTED], "steps": 8, "save_every": 1}
    whole = finetune(runs.recipe(tmp_path, output=str(tmp_path / "whole"), **changes), write=False)
    # one process imports the libraries, and forks a run for each kill
    command = [sys.executable, "-c", _SERVER]
    with subprocess.Popen(
        command, env=_ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        # at different distances from a finished checkpoint: in a step, in a save, in the removal of an old one
        for i, (saves, delay) in enumerate([(1, 0.0), (1, 0.03), (2, 0.06), (4, 0.1)]):
            recipe = runs.recipe(tmp_path, output=str(tmp_path / f"killed{i}"), **changes)
            recipe.to_yaml(tmp_path / "r.yaml")
            print(tmp_path / "r.yaml", file=server.stdin, flush=True)
            pid = int(server.stdout.readline())
            for _ in range(saves):
                assert server.stdout.readline() == "saved\n"
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
            while server.stdout.readline() != "over\n":
                pass
            again = resume(recipe)
            assert again.resumed_from is not None and again.resumed_from >= saves
            assert losses(again) == losses(whole), (saves, delay)
        server.stdin.close()


@pytest.mark.slow
def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_stays_whole(tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path, save_every=2, lora_r=8)
    whole = finetune(runs.recipe(tmp_path, output=str(tmp_path / "whole"), lora_r=8), write=False)
    stopped(recipe, 3)
    size = max(path.stat().st_size for path in (tmp_path / "out" / "checkpoint-2").iterdir())
    script = """
import sys, torch
torch.set_num_threads(1)
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.recipes.finetune import Recipe
finetune(Recipe.from_yaml(sys.argv[1], {"resume": True}), write=False)
"""
    recipe.to_yaml(tmp_path / "r.yaml")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "r.yaml")],
        env=_ENVIRONMENT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2)),  # as a full disk does
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "File too large" in done.stderr.splitlines()[-1] and "out" in done.stderr.splitlines()[-1]
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    assert verify_manifest(tmp_path / "out" / "checkpoint-2")
    assert losses(resume(recipe)) == losses(whole)


def test_progress_in_a_checkpoint_is_plain_json(tmp_path: Path) -> None:
    stopped(runs.recipe(tmp_path, methods=[runs.ROUTED]), 3)
    progress = json.loads((tmp_path / "out" / "checkpoint-2" / "progress.json").read_text())
    assert [row["step"] for row in progress["run"]["steps"]] == [1, 2]
    assert progress["run"]["perplexity"].keys() == {"dense", "after_conversion"}
