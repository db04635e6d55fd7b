"""What a recipe passes on: which keys it takes, where they end up, and what makes two recipes another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparsetrain.recipes.finetune import Recipe
from sparsetrain.recipes.passed_keys import NO_VARIANTS, OWNED, VARIANTS
from sparsetrain.recipes.pretrain import PretrainRecipe
from sparsetrain.runs.comparison import side_recipe

PLAIN: dict[str, Any] = {"model": "m", "data": "d", "methods": []}


def recipe(**changes: Any) -> Recipe:
    return Recipe.from_values(PLAIN | changes)


def test_short_keys_and_sections_are_one() -> None:
    short = recipe(optim="sgd", report_to="none", lora_dropout=0.1, lora_bias="all", lora_variant="dora")
    spelled = recipe(
        training={"optim": "sgd", "report_to": "none"}, lora={"lora_dropout": 0.1, "bias": "all", "use_dora": True}
    )
    assert short == spelled and short.fingerprint() == spelled.fingerprint()
    assert recipe(training=["optim_args=a=1", "label_smoothing_factor=1e-1"]).training == {
        "optim_args": "a=1",
        "label_smoothing_factor": 0.1,
    }
    assert recipe(lora_dropout="0.1").lora == {"lora_dropout": 0.1}
    assert recipe(report_to="wandb, tensorboard").training == {"report_to": ["wandb", "tensorboard"]}


def test_it_survives_the_file_and_the_command_line_changes_single_keys(tmp_path: Path) -> None:
    asked = recipe(training={"optim": "sgd", "neftune_noise_alpha": 5.0}, lora={"use_rslora": True})
    asked.to_yaml(tmp_path / "a.yaml")
    assert Recipe.from_yaml(tmp_path / "a.yaml") == asked
    changed = Recipe.from_yaml(tmp_path / "a.yaml", {"training": {"optim": "adafactor"}, "lora_dropout": 0.1})
    assert changed.training == {"optim": "adafactor", "neftune_noise_alpha": 5.0}
    assert changed.lora == {"use_rslora": True, "lora_dropout": 0.1}
    assert "training" not in recipe().to_yaml() and "lora:" not in recipe().to_yaml()


def test_a_fingerprint_has_what_trains_and_not_what_watches() -> None:
    assert recipe(optim="sgd").fingerprint() != recipe().fingerprint() != recipe(lora_variant="dora").fingerprint()
    assert recipe(report_to="wandb", run_name="a").fingerprint() == recipe().fingerprint()
    assert not {"training", "lora", "eval_data", "early_stopping"} & recipe().training_values().keys()
    every = recipe(eval_every=2, early_stopping=3)  # then it says how long a run is
    assert every.differences(recipe(eval_every=4, early_stopping=3).training_values()) == [
        "eval_every: 4 there, 2 here"
    ]
    assert any("training" in line for line in recipe(optim="sgd").differences(recipe().training_values()))


def test_both_sides_of_a_comparison_have_it() -> None:
    asked = Recipe.from_values({**PLAIN, "methods": None, "preset": "spt", "optim": "sgd", "lora_dropout": 0.1})
    dense = side_recipe(asked, "dense", {})
    assert (dense.training, dense.lora) == (asked.training, asked.lora) and not dense.methods  # type: ignore[attr-defined]


@pytest.mark.parametrize("key", [*OWNED["training"], "remove_unused_columns", "fp16", "deepspeed", "push_to_hub"])
def test_what_the_recipe_says_itself_is_refused_with_its_name(key: str) -> None:
    own = OWNED["training"].get(key)
    if own in ("beta1", "beta2", "eps"):  # keys of pretrain alone
        assert recipe(training={key: 0.5}).training == {key: 0.5}
        with pytest.raises(ValueError, match=f"training.{key}.* by {own} "):
            PretrainRecipe.from_values({"model": "m", "data": "d", "training": {key: 0.5}})
        return
    with pytest.raises(ValueError, match=f"training.{key}.*" + (f"--{own}".replace("_", "-") if own else "not taken")):
        recipe(training={key: 1})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": 3}, "training is 3"),
        ({"training": ["optim"]}, "no key and '='"),
        ({"training": {"optim": float("inf")}}, "training.optim"),
        ({"lora": {"r": 4}}, r"lora_r \(--lora-r\)"),
        ({"lora": {"loftq_config": {}}}, "quantised weights"),
        ({"lora": {"use_dora": True}, "lora_r": 0}, "lora_r=0 trains without LoRA"),
        ({"optim": "sgd", "training": {"optim": "adafactor"}}, "optim and training.optim are both given"),
        ({"lora_variant": "dorra"}, "Did you mean 'dora'"),
        ({"early_stopping": 2}, "--eval-every"),
        ({"early_stopping": 2, "eval_every": 1, "compare": "dense"}, "same steps"),
        ({"task": "diffusion", "eval_data": "x"}, "reads images"),
    ],
)
def test_mistakes_are_told(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recipe(**changes)


def test_variants_are_keys_or_say_why_not() -> None:
    for name, keys in VARIANTS.items():
        assert recipe(lora_variant=name).lora == keys
    for name in NO_VARIANTS:
        with pytest.raises(ValueError, match=f"lora_variant={name}: .*Give one of lora, dora"):
            recipe(lora_variant=name)


def test_pretrain_has_the_trainers_keys_alone() -> None:
    made = PretrainRecipe.from_values({"model": "m", "data": "d", "optim": "sgd", "training": {"run_name": "a"}})
    assert made.training == {"run_name": "a", "optim": "sgd"}
    with pytest.raises(ValueError, match="unknown key 'lora_dropout'"):
        PretrainRecipe.from_values({"model": "m", "data": "d", "lora_dropout": 0.1})
