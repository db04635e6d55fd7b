"""A run ends with the best of its evaluated weights where that is asked for, and so does what is deployed from it."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

from sparsetrain.core.errors import CheckpointError
from sparsetrain.hf.model.io import load
from sparsetrain.hf.train import run as running
from sparsetrain.hf.train.evaluate import evaluate
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.hf.train.pretrain import pretrain
from sparsetrain.recipes.pretrain import PretrainRecipe
from sparsetrain.runs.layout import checkpoint_folder
from tests.hf import runs


def recipe(folder: Path, **changes: Any) -> Any:
    """A run whose held-out rows are other words than it learns, so that its loss on them soon rises."""
    for name, words in (("text", "red sun runs over the"), ("other", "blue moon sits under a")):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "a.txt").write_text(f"{words} " * 400)
    usual = {"dtype": "fp32", "deploy": "dense", "save_every": 0, "load_best_model_at_end": True}
    usual |= {"steps": 7, "eval_every": 2, "eval_tokens": 256, "eval_data": str(folder / "other")}
    return runs.recipe(folder, **(usual | {"lr": 0.03, "lr_schedule": "constant"} | changes))


def curve(result: Any) -> dict[int, float]:
    """Step -> held-out loss, after training began."""
    return {point["step"]: point["loss"] for point in result.run["evals"] if point["step"]}


def ends_with_its_best(result: Any) -> int:
    """The best step; what was measured last of the trained model is its loss."""
    losses, sign = curve(result), -1 if result.recipe.greater_is_better else 1
    best = min(losses, key=lambda step: (sign * losses[step], step))
    assert result.run["perplexity"]["after_training"] == pytest.approx(math.exp(losses[best]), rel=1e-5)
    return best


FLOOD = {"method": "flood_fill_attention", "block_tokens": 8, "filter_edge": 5, "keep_ratio": 0.15}
FLOOD |= {"change_threshold": 0, "probe_every": 2, "max_dense_steps": 4}
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "all weights": {"lora_r": 0},
    "routed": {"methods": [runs.ROUTED]},
    "routed, with its router": {"methods": [runs.ROUTED], "train_auxiliary": True},
    "routed, deployed sparse": {"methods": [runs.CLUSTERED], "deploy": "sparse"},
    "attention": {"methods": [runs.PQ]},
    "tokens": {"methods": [{"method": "token_selection"}]},
    "2:4": {"methods": [{"method": "semi_structured"}], "lora_r": 0},
    "sara": {"methods": [{"method": "sara"}], "deploy": "sparse", "lora_r": None, "greater_is_better": True},
    "pst": {"methods": [{"method": "pst"}], "deploy": "sparse", "lora_r": None, "greater_is_better": True},
    "monarch": {"methods": [{"method": "monarch", "num_blocks": 4, "force": True}], "deploy": "sparse", "lora_r": None},
    "patterns that were found later": {"methods": [FLOOD], "deploy": "sparse", "lora_r": 0},
    "an average": {"ema_decay": 0.5},
}


@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS.keys())
def test_the_trained_model_is_that_of_the_best_evaluation(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A run of seven steps each."""
    asked = recipe(tmp_path, **changes)
    result = finetune(asked, write=False)
    best = ends_with_its_best(result)
    assert best < 7 and checkpoint_folder(tmp_path / "out", best).is_dir(), curve(result)
    assert any(f"The weights are those of step {best}, with the " in note for note in result.notes)
    assert loss_of(load(tmp_path / "out").model, asked) == pytest.approx(curve(result)[best], abs=1e-5)


def loss_of(model: Any, asked: Any) -> float:
    from sparsetrain.hf.train.assemble import open_parts

    bundle = open_parts(asked, lambda _event: None).bundle
    given = {"batch_size": asked.batch_size, "max_tokens": asked.eval_tokens}
    return evaluate(model.eval(), bundle.eval, bundle.collate_fn, task="lm", **given).loss


def test_the_adapter_that_is_deployed_is_the_best_one_s(tmp_path: Path) -> None:
    """In plain PEFT, on the plain base: it equals that of the best checkpoint, of the sparse phase."""
    asked = recipe(tmp_path, methods=[runs.ROUTED], dense_first=0.0, dense_last=0.2)
    result = finetune(asked, write=False)
    best = ends_with_its_best(result)
    with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5.23 by a name that is deprecated there
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        base = AutoModelForCausalLM.from_pretrained(asked.model)
        plain = PeftModel.from_pretrained(base, str(tmp_path / "out/adapter"))
    assert loss_of(plain, asked) == pytest.approx(curve(result)[best], abs=1e-5)


def test_a_run_that_is_killed_goes_on_to_the_same_best(tmp_path: Path) -> None:
    """The best checkpoint is neither the newest nor among those that are kept for going on. Three runs."""
    changes = {"save_every": 1, "steps": 8}
    whole = finetune(recipe(tmp_path, **changes), write=False)
    best = ends_with_its_best(whole)
    kept = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "out").glob("checkpoint-*"))
    assert kept == [best, 7, 8] and best < 7

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 7:
                raise KeyboardInterrupt

    asked = recipe(tmp_path, output=str(tmp_path / "again"), **changes)
    with pytest.raises(KeyboardInterrupt):
        finetune(asked, callbacks=[Stop()], write=False)
    other = asked.model_copy(update={"resume": True, "load_best_model_at_end": False})
    with pytest.raises(CheckpointError, match="load_best_model_at_end"):
        finetune(other, write=False)
    resumed = finetune(asked.model_copy(update={"resume": True}), write=False)
    assert resumed.resumed_from == 6 and curve(resumed) == curve(whole) and ends_with_its_best(resumed) == best


def test_what_was_killed_after_its_last_step_ends_with_its_best(tmp_path: Path) -> None:
    """SaRA's values are in the checkpoint's state, and in no weights. Two runs."""

    class Stop(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    changes = METHODS["sara"] | {"save_every": 7}
    whole = finetune(recipe(tmp_path, **changes), write=False)
    asked = recipe(tmp_path, output=str(tmp_path / "again"), **changes)
    with pytest.raises(KeyboardInterrupt):
        finetune(asked, callbacks=[Stop()], write=False)
    resumed = finetune(asked.model_copy(update={"resume": True}), write=False)
    assert resumed.resumed_from == 7 and curve(resumed) == pytest.approx(curve(whole))
    assert ends_with_its_best(resumed) == ends_with_its_best(whole)


def test_a_best_checkpoint_that_is_damaged_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(model: Any, handle: Any, average: Any, asked: Any, journal: Any) -> Any:
        for path in (tmp_path / "out").glob("checkpoint-*/adapter_model.safetensors"):
            path.write_bytes(b"0" * path.stat().st_size)
        return plain(model, handle, average, asked, journal)

    plain = running.take_best
    monkeypatch.setattr(running, "take_best", damage)
    with pytest.raises(CheckpointError, match="adapter_model"):
        finetune(recipe(tmp_path), write=False)


def test_the_last_weights_may_be_the_best(tmp_path: Path) -> None:
    result = finetune(recipe(tmp_path, eval_data=None, lr=1e-3, steps=4), write=False)
    assert ends_with_its_best(result) == 4 and any("The last weights have the lowest" in note for note in result.notes)


def test_early_stopping_ends_with_the_best(tmp_path: Path) -> None:
    result = finetune(recipe(tmp_path, early_stopping=2, steps=40), write=False)
    best = ends_with_its_best(result)
    assert best <= len(result.run["steps"]) < 40
    assert not any("The last weights are kept" in note for note in result.notes)


def test_pretraining_goes_by_accuracy_where_that_is_asked(tmp_path: Path) -> None:
    """Of a labelled task, whose accuracy need not be best where its loss is."""
    draws = torch.Generator().manual_seed(0)
    rows = [
        "text,label",
        *(f"{'ab'[i % 2]} {torch.randint(9, (1,), generator=draws).item()},{i % 2}" for i in range(80)),
    ]
    (tmp_path / "rows.csv").write_text("\n".join(rows))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    asked = PretrainRecipe.from_values(
        {
            "model": "sequence-encoder",
            "set": [f"{key}={value}" for key, value in sizes.items()],
            "data": str(tmp_path / "rows.csv"),
            "task": "classify",
            "output": str(tmp_path / "out"),
            **{"seq_len": 16, "steps": 9, "batch_size": 8, "lr": 0.02, "eval_every": 2, "save_every": 0},
            **{"device": "cpu", "dtype": "fp32", "load_best_model_at_end": True},
            "metric_for_best_model": "eval_accuracy",
        }
    )
    result = pretrain(asked, write=False)
    values = {point["step"]: point["accuracy"] for point in result.run["evals"] if point["step"]}
    assert len(set(values.values())) > 1
    assert result.run["accuracy"]["after_training"] == max(values.values())
    assert any("highest held-out accuracy" in note for note in result.notes)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    seen: list[tuple[int, dict[str, Any]]] = []

    class Dashboard(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append((state.global_step, dict(kwargs["logs"])))

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", Dashboard)
    yield seen


def test_dashboards_are_told_every_logging_steps_steps(tmp_path: Path, told: list[tuple[int, dict[str, Any]]]) -> None:
    training = {"logging_steps": 3, "logging_first_step": True}
    asked = recipe(tmp_path, report_to="tensorboard", training=training, load_best_model_at_end=False)
    result = finetune(asked, write=False)
    losses = [row["loss"] for row in result.run["steps"]]
    assert len(losses) == 7  # each is recorded, and drawn in the report
    means = {1: losses[0], 3: sum(losses[1:3]) / 2, 6: sum(losses[3:6]) / 3, 7: losses[6]}
    assert {step: logs["loss"] for step, logs in told if "loss" in logs} == pytest.approx(means)
    assert [step for step, logs in told if "eval_loss" in logs] == [2, 4, 6]
    assert asked.fingerprint() == recipe(tmp_path, load_best_model_at_end=False).fingerprint()
    assert json.loads(json.dumps(asked.training)) == {"report_to": "tensorboard", **training}
