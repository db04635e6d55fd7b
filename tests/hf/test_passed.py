"""What a recipe passes on to the Trainer and to PEFT has its effect, on continued runs as well."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

from sparsetrain.core.errors import CheckpointError
from sparsetrain.hf.model.io import load
from sparsetrain.hf.train import passed
from sparsetrain.hf.train.assemble import open_parts
from sparsetrain.hf.train.evaluate import evaluate
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.hf.train.pretrain import pretrain
from sparsetrain.recipes.pretrain import PretrainRecipe
from tests.hf import runs


def recipe(folder: Path, **changes: Any) -> Any:
    return runs.recipe(folder, **({"deploy": "dense", "dtype": "fp32", "save_every": 0, "steps": 3} | changes))


class Seen(TrainerCallback):
    """Notes the classes of what a run steps with."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer = type(getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])).__name__
        self.arguments, self.step = args, state.global_step


def interrupted(asked: Any, step: int) -> Any:
    """Run a recipe until a step; the recipe that goes on from there."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(asked, callbacks=[Stop()], write=False)
    return asked.model_copy(update={"resume": True})


def quality_of(model: Any, asked: Any) -> float:
    bundle = open_parts(asked, lambda _event: None).bundle
    given = {"batch_size": asked.batch_size, "max_tokens": asked.eval_tokens}
    return evaluate(model, bundle.eval, bundle.collate_fn, task="lm", **given).loss


VARIANTS: list[dict[str, Any]] = [
    {"lora_variant": "dora"},
    {"lora_variant": "rslora"},
    {"lora_variant": "pissa"},
    {"lora_variant": "olora"},
    {"lora_variant": "orthogonal"},
    {"lora_dropout": 0.2, "lora_bias": "all"},
    {"lora": {"rank_pattern": {"q_proj": 2}, "layers_to_transform": [1]}, "lora_targets": ["q_proj", "up_proj"]},
    {"lora": {"modules_to_save": ["lm_head"], "alpha_pattern": {"q_proj": 4}}},
    {"lora_variant": "rslora", "lora_dropout": 0.1, "methods": [runs.ROUTED]},
    {"lora_variant": "pissa", "methods": [runs.ROUTED]},
    {"lora_variant": "dora", "methods": [runs.PQ]},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_an_adapter_of_any_variant_loads_with_plain_peft(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Two runs of a model's forward beside the training: some seconds where a core is shared."""
    asked = recipe(tmp_path, **changes)
    ended = finetune(asked, write=False).run["evals"][-1]["loss"]
    written = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    targets = written.pop("target_modules")
    assert targets and asked.lora.items() <= written.items()
    with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5.23 by a name that is deprecated there
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(asked.model), str(tmp_path / "out/adapter")
        )
    assert quality_of(model.eval(), asked) == pytest.approx(ended, abs=1e-5)
    assert quality_of(load(tmp_path / "out").model, asked) == pytest.approx(ended, abs=1e-5)


def test_the_optimizer_is_the_one_that_is_asked_for_and_goes_on(tmp_path: Path) -> None:
    """Slow for three runs."""
    changes = {"optim": "adafactor", "save_every": 2, "steps": 4, "training": {"label_smoothing_factor": 0.1}}
    asked, seen = recipe(tmp_path, **changes), Seen()
    whole = finetune(asked, callbacks=[seen], write=False).run
    assert seen.optimizer == "Adafactor" and seen.arguments.label_smoothing_factor == 0.1

    halved = interrupted(recipe(tmp_path, **changes, output=str(tmp_path / "again")), 3)
    other = recipe(tmp_path, **changes | {"optim": "sgd"}, output=str(tmp_path / "again"), resume=True)
    with pytest.raises(CheckpointError, match="training"):
        finetune(other, write=False)
    seen = Seen()
    resumed = finetune(halved, callbacks=[seen], write=False).run
    assert seen.optimizer == "Adafactor" and seen.step == 3
    assert [row["loss"] for row in resumed["steps"]] == [row["loss"] for row in whole["steps"]]


def test_what_is_passed_on_changes_the_losses(tmp_path: Path) -> None:
    """Slow for six runs."""
    losses = {}
    for name, changes in {
        "plain": {},
        "smoothed": {"training": {"label_smoothing_factor": 0.3}},
        "noisy": {"training": {"neftune_noise_alpha": 50.0}},
        "dropped": {"lora_dropout": 0.5, "lora_variant": "pissa"},
        "whole": {"lora_variant": "pissa"},
        "constant": {"training": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 3.0}}},
    }.items():
        run = finetune(recipe(tmp_path, output=str(tmp_path / name), **changes), write=False).run
        losses[name] = tuple(row["loss"] for row in run["steps"])
    assert len(set(losses.values())) == len(losses)
    assert losses["smoothed"][0] != losses["plain"][0] != losses["noisy"][0]
    assert losses["dropped"][0] != losses["whole"][0]
    assert losses["constant"][:2] == losses["plain"][:2]  # the first step's rate is the peak


def test_pretraining_passes_on_too(tmp_path: Path) -> None:
    data, seen = runs.text(tmp_path / "text"), Seen()
    values = {"model": "gpt2-nano", "data": str(data), "output": str(tmp_path / "out"), "steps": 2, "seq_len": 32}
    values |= {"set": {"n_layer": 1, "n_embd": 16, "n_head": 2}, "optim": "sgd", "device": "cpu", "dtype": "fp32"}
    values |= {"batch_size": 2, "eval_tokens": 64, "save_every": 0, "training": {"optim_args": "momentum=0.5"}}
    pretrain(PretrainRecipe.from_values(values), callbacks=[seen], write=False)
    assert seen.optimizer == "SGD"


def test_a_dashboard_gets_every_loss(tmp_path: Path) -> None:
    """Slow for three runs, and tensorboard's reader."""
    pytest.importorskip("tensorboard", reason="the dashboard's library is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore

    asked = recipe(tmp_path, report_to="tensorboard", eval_every=1)
    run = finetune(asked, write=False).run
    (events,) = (tmp_path / "out" / "runs").iterdir()
    found = EventAccumulator(str(events)).Reload()
    assert [event.value for event in found.Scalars("train/loss")] == pytest.approx([s["loss"] for s in run["steps"]])
    evals = [point["loss"] for point in run["evals"] if 0 < point["step"] < 3]
    assert [event.value for event in found.Scalars("eval/loss")] == pytest.approx(evals)
    asked = interrupted(recipe(tmp_path, report_to="tensorboard", save_every=2, output=str(tmp_path / "again")), 3)
    assert finetune(asked, write=False).resumed_from == 2  # the dashboard's folder is in no way


def test_a_dashboard_that_is_not_installed_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passed, "get_available_reporting_integrations", lambda: ["mlflow"])
    with pytest.raises(ValueError, match=r"report_to=wandb: .*pip install wandb.*Installed: mlflow"):
        finetune(recipe(tmp_path, report_to="wandb"))
    assert not (tmp_path / "out").exists()


def test_a_run_stops_early_and_again_when_it_goes_on(tmp_path: Path) -> None:
    """The rate is far too high, so that the held-out loss rises. Slow for three runs."""
    changes: dict[str, Any] = {"steps": 60, "eval_every": 2, "lr": 0.5, "lr_schedule": "constant"}
    changes |= {"early_stopping": 3, "save_every": 2, "eval_tokens": 128}
    run = finetune(recipe(tmp_path, **changes), write=False)
    steps = len(run.run["steps"])
    assert 6 < steps < 60
    losses = [point["loss"] for point in run.run["evals"][:-1]]  # the last is that of the trained model
    assert len(losses) - 1 - losses.index(min(losses)) == 3
    assert any(f"Stopped early after step {steps}" in note for note in run.notes)
    assert run.run["evals"][-1]["step"] == steps
    asked = interrupted(recipe(tmp_path, output=str(tmp_path / "again"), **changes), 5)
    resumed = finetune(asked, write=False)
    assert resumed.resumed_from == 4
    assert [row["loss"] for row in resumed.run["steps"]] == [row["loss"] for row in run.run["steps"]]


def test_held_out_data_of_its_own_is_what_is_evaluated(tmp_path: Path) -> None:
    runs.recipe(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text(" ".join(["sun moon"] * 600))
    shared, own = recipe(tmp_path), recipe(tmp_path, eval_data=str(other), output=str(tmp_path / "own"))
    words = {}
    for asked in (shared, own):
        bundle = open_parts(asked, lambda _event: None).bundle
        assert len(set(bundle.train[0]["input_ids"])) > 10
        words[asked.output] = set(bundle.eval[0]["input_ids"][1:-1])  # type: ignore[index]
    assert len(words[own.output]) == 2 and len(words[shared.output]) > 10
    assert own.fingerprint() != shared.fingerprint()
    run = finetune(own, write=False).run
    assert run["evals"][-1]["loss"] == pytest.approx(quality_of(load(tmp_path / "own").model, own), abs=1e-5)


def test_the_splits_of_a_data_set_are_chosen(tmp_path: Path) -> None:
    runs.recipe(tmp_path)
    rows = {"learn": "red sun runs", "test": "blue moon sits"}
    table = DatasetDict({name: Dataset.from_dict({"text": [text] * 400}) for name, text in rows.items()})
    table.save_to_disk(str(tmp_path / "table"))
    asked = recipe(tmp_path, data=str(tmp_path / "table"), dataset_train_split="learn", dataset_test_split="test")
    bundle = open_parts(asked, lambda _event: None).bundle
    words = {side: set(rows["input_ids"][0]) for side, rows in (("learn", bundle.train), ("test", bundle.eval))}  # type: ignore[index]
    ids = runs.tokenizer().convert_tokens_to_ids
    assert {ids("red"), ids("runs")} <= words["learn"] and {ids("blue"), ids("sits")} <= words["test"]
    assert not words["learn"] & {ids("blue"), ids("sits")}
    with pytest.raises(ValueError, match="no split 'train'"):
        open_parts(recipe(tmp_path, data=str(tmp_path / "table")), lambda _event: None)


def test_dora_on_a_linear_that_a_method_computes_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DoRA"):
        finetune(recipe(tmp_path, lora_variant="dora", methods=[runs.ROUTED]), write=False)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"init_lora_weights": "loftq"}, r"init_lora_weights='loftq' is not taken: it puts quantised weights in place"),
        ({"init_lora_weight": "pissa"}, "LoraConfig has no 'init_lora_weight'"),
    ],
)
def test_what_peft_would_not_take_is_told_before_a_weight_is_read(
    tmp_path: Path, lora: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_parts(recipe(tmp_path, lora=lora), lambda _event: None)


@pytest.mark.parametrize("name", ["adamw_8bit", "galore_adamw", "lion_8bit"])
def test_an_optimizer_whose_library_is_missing_is_told_before_training(tmp_path: Path, name: str) -> None:
    from importlib.util import find_spec

    if find_spec("galore_torch" if "galore" in name else "bitsandbytes"):
        pytest.skip("its library is installed")
    with pytest.raises(ValueError, match=f"optim={name} cannot be made here"):
        finetune(recipe(tmp_path, optim=name))
    assert not (tmp_path / "out").exists()
