"""A run that ends between its last step and its result goes on to evaluation and saving alone, with equal numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from sparsetrain.core.files import to_json
from sparsetrain.hf.train import run as run_module
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.hf.train.pretrain import PretrainRecipe, pretrain
from sparsetrain.hf.train.run import Result
from sparsetrain.recipes.run import RunRecipe
from tests.hf import runs

TWO_FOUR = {"method": "semi_structured", "dense_tail_ratio": 0.4}
VOLATILE = {"setup_s", "peak_rss_bytes", "wall_s", "step_time_s", "memory_bytes", "output", "resume", "saved"}
"""What differs between two runs of the same recipe in two folders."""
VOLATILE |= {"resumed_from", "data_order", "machine"}


class Killed(BaseException):
    """Nothing but what the run itself does in every ending is cleaned up."""


def pretraining(folder: Path, **changes: Any) -> PretrainRecipe:
    values: dict[str, Any] = {
        "model": "gpt2-nano",
        "set": {"n_layer": 2, "n_embd": 16, "n_inner": 64},
        "data": str(runs.text(folder / "text")),
        "output": str(folder / "out"),
        "seq_len": 16,
        "batch_size": 2,
        "steps": 5,
        "lr": 1e-2,
        "eval_tokens": 64,
        "save_every": 2,
        "device": "cpu",
        "methods": [],
    }
    return PretrainRecipe.from_values(values | changes)


RECIPES: dict[str, Any] = {
    "adapter": lambda folder, **changes: runs.recipe(folder, methods=[runs.CLUSTERED, runs.PQ], **changes),
    "all weights, last step not saved apart": lambda folder, **changes: runs.recipe(
        folder, methods=[runs.ROUTED], lora_r=0, save_every=4, **changes
    ),
    "whole epochs": lambda folder, **changes: runs.recipe(folder, epochs=1.0, batch_size=16, **changes),
    "2:4, dense at the end": lambda folder, **changes: pretraining(folder, methods=[TWO_FOUR], **changes),
}


def train(recipe: RunRecipe, **options: Any) -> Result:
    return pretrain(recipe, **options) if isinstance(recipe, PretrainRecipe) else finetune(recipe, **options)  # type: ignore[arg-type]


def stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: stable(item) for key, item in value.items() if key not in VOLATILE}
    return [stable(item) for item in value] if isinstance(value, list | tuple) else value


def differing(one: Any, other: Any, place: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [line for key in one for line in differing(one[key], other[key], f"{place}.{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [line for i, pair in enumerate(zip(one, other)) for line in differing(*pair, f"{place}.{i}")]
    return [] if one == other else [f"{place}: {one} and {other}"]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in RECIPES])
def test_it_ends_as_an_uninterrupted_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(RECIPES[kind](tmp_path, output=str(tmp_path / "whole")))
    recipe = RECIPES[kind](tmp_path, output=str(tmp_path / "parts"))

    def killed(*_: Any, **__: Any) -> Any:
        raise Killed

    events: list[dict[str, Any]] = []
    for name in ("_record", "save", "write_report", "write_json"):  # ever later, in one folder
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(run_module, name, killed)
            train(recipe.model_copy(update={"resume": name != "_record"}), report=events.append)
    steps = len(whole.run["steps"])
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, steps + 1))
    again = train(recipe.model_copy(update={"resume": True}), report=events.append)
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, steps + 1))
    assert again.resumed_from == steps
    assert differing(*(stable(json.loads(to_json(result.to_dict()))) for result in (again, whole))) == []
    assert again.run.keys() == whole.run.keys()
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    for file in whole.saved.glob("*.safetensors"):
        one, other = load_file(file), load_file(again.saved / file.name)
        assert one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)


def test_nothing_is_trained_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, steps = runs.recipe(tmp_path, steps=2, save_every=2), []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_module, "_record", lambda *_: (_ for _ in ()).throw(Killed))
        finetune(recipe, write=False)
    again = finetune(recipe.model_copy(update={"resume": True}), write=False, report=steps.append)
    assert not [event for event in steps if event["event"] == "step"]
    assert len(again.run["steps"]) == 2 and again.run["evals"][-1]["step"] == 2 and again.run["static_bytes"]


def test_all_weights_in_bf16_are_evaluated_alike_after_training_and_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 masters train under a Trainer's autocast; a model that is loaded for its evaluation has none of its own."""
    given = {"lora_r": 0, "dtype": "bf16", "steps": 2, "save_every": 2}
    whole = finetune(runs.recipe(tmp_path, output=str(tmp_path / "whole"), **given))
    recipe = runs.recipe(tmp_path, **given)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_module, "_record", lambda *_: (_ for _ in ()).throw(Killed))
        finetune(recipe)
    again = finetune(recipe.model_copy(update={"resume": True}))
    for name in ("evals", "perplexity"):
        assert stable(again.run[name]) == stable(whole.run[name])  # type: ignore[literal-required]


def test_nothing_is_left_of_a_run_without_checkpoints_and_it_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, heard = runs.recipe(tmp_path, save_every=0, steps=2), []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_module, "measure_quality", lambda *_, **__: (_ for _ in ()).throw(Killed))
        finetune(recipe)
    assert not (tmp_path / "out").exists()
    again = finetune(recipe.model_copy(update={"resume": True}), report=heard.append)
    assert again.resumed_from is None and again.data_order is not None
    lines = [event["text"] for event in heard if event["event"] == "note"]
    assert len([line for line in lines if "starting from the beginning" in line]) == 1
