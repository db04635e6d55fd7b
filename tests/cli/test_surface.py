"""The command line is a promise: names of commands and flags change only on purpose, here as well."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import typer

import sparsetrain
from sparsetrain.cli.app import app_of
from sparsetrain.cli.flags import FLAGS, STUDY_FLAGS
from sparsetrain.cli.passed_flags import PASSED as PASSED_FLAGS
from sparsetrain.cli.pretrain_flags import PRETRAIN_FLAGS
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.recipes.passed import short_keys
from sparsetrain.recipes.presets import PRESETS, STUDIED_PRESET
from sparsetrain.recipes.pretrain import PretrainRecipe
from tests.cli.conftest import Call

ALWAYS = {"--json", "--debug"}
BITS = {"--load-in-4bit", "--no-load-in-4bit", "--load-in-8bit", "--no-load-in-8bit"}
TRUST = {"--trust-remote-code", "--no-trust-remote-code"}
RECIPE = {
    "--model", "--data", "--task", "--text-column", "--holdout", "--output", "--seq-len", "--batch-size",
    "--grad-accum", "--steps", "--epochs", "--preset", "--method", "--calibration-tokens", "--compare", "--lora-r",
    "--lora-alpha", "--lora-targets", "--lr", "--lr-schedule", "--warmup-steps", "--weight-decay", "--max-grad-norm",
    "--ema-decay", "--save-every", "--early-stopping",
    "--eval-data", "--dataset-config", "--dataset-train-split", "--dataset-test-split", "--model-revision",
    *BITS, "--packing", "--no-packing",
    "--keep-checkpoints", "--eval-every", "--eval-tokens", "--resume", "--no-resume", "--seed", "--dtype",
    "--gradient-checkpointing", "--device", "--threads", "--distill-steps", "--distill-lr",
    "--deploy", "--dense-first", "--dense-last", "--train-auxiliary", "--no-train-auxiliary",
    "--dataset-revision", "--streaming", "--no-streaming", "--stream-rows", *TRUST,
    "--lora-dtype", "--activation-offloading", "--no-activation-offloading", "--tiled-mlp", "--chat-template-path",
    "--load-best-model-at-end", "--no-load-best-model-at-end", "--metric-for-best-model", "--greater-is-better",
    "--no-greater-is-better",
}  # fmt: skip
PASSED = {"--set", "--optim", "--report-to", "--run-name"}
LORA = {"--lora-variant", "--lora-dropout", "--lora-bias"}
DEPLOY = {"--deploy", "--dense-first", "--dense-last", "--train-auxiliary", "--no-train-auxiliary"}
EXACT = {"--activation-offloading", "--no-activation-offloading", "--tiled-mlp"}
ADAPTER = {"--lora-dtype", "--preset", "--distill-steps", "--distill-lr", "--lora-r", "--lora-alpha", "--lora-targets"}
PRETRAINED = {"--model-revision", *TRUST, "--packing", "--no-packing", "--chat-template-path", *BITS}
PRETRAIN = RECIPE - DEPLOY - ADAPTER - EXACT - PRETRAINED | PASSED | {
    "--set", "--data-folder", "--tokenizer", "--train-rows", "--min-lr-ratio", "--beta1", "--beta2", "--eps",
    "--clip-value", "--compare-lr", "--find-switch",
}  # fmt: skip
SURFACE = {
    "finetune": ALWAYS | RECIPE | PASSED | LORA | {"--recipe", "--dry-run", "--push-to-hub", "--hub-model-id"}
    | {"--memory", "--tolerance", "--goal", "--choose-seconds", "--choose-again"},
    "pretrain": ALWAYS | PRETRAIN | {"--recipe", "--dry-run", "--grid", "--grid-mode"},
    "eval": ALWAYS | {"MODEL", "--all", "--data", "--task", "--text-column", "--holdout", "--seq-len", "--batch-size"}
    | {"--eval-tokens", "--seed", "--dtype", "--device", "--threads"} | TRUST | BITS,
    "chat": ALWAYS | {"RUN", "--prompt", "--system", "--max-new-tokens", "--temperature"}
    | {"--seed", "--dtype", "--device", "--threads"} | TRUST | BITS,
    "explain": ALWAYS | {"RUN", "IMAGE_OR_TEXT", "--output", "--top"},
    "export": ALWAYS | {"RUN", "--output", "--format", "--merge-lora", "--keep-lora", "--trust-remote-code"},
    "sample": ALWAYS | {"RUN", "--num", "--output", "--steps", "--guidance", "--class", "--columns", "--quality"}
    | {"--features", "--data", "--seed", "--device", "--threads"},
    "plan": ALWAYS | {"--recipe", "--model", "--data", "--task", "--preset", "--method", "--seq-len", "--batch-size"}
    | {"--grad-accum", "--lora-r", "--dtype", "--gradient-checkpointing", "--memory", "--goal", "--gpu", "--fit"}
    | {"--write", "--plot", "--seq", "--batch", "--gpus", "--gpus-per-node", "--bandwidth"}
    | {"--lora-dtype", "--optim"} | BITS
    | {"--streaming", "--no-streaming", "--stream-rows"},
    "sensitivity": ALWAYS | {"--recipe", "--budget", "--write", "--model", "--data", "--task", "--text-column"}
    | {"--seq-len", "--preset", "--method", "--calibration-tokens", "--eval-tokens", "--steps", "--seed", "--dtype"}
    | {"--device", "--threads", "--holdout"},
    "methods": ALWAYS | {"NAME"},
    "patterns": ALWAYS | {"RUN", "--output"},
    "profile": ALWAYS | {"--recipe", "--model", "--data", "--task", "--text-column", "--seq-len", "--batch-size"}
    | {"--grad-accum", "--steps", "--preset", "--method", "--calibration-tokens", "--compare", "--lora-r"}
    | {"--lora-alpha", "--lora-targets", "--seed", "--dtype", "--gradient-checkpointing", "--device", "--threads"}
    | {"--plot", "--output", "--layers"},
    "bench": ALWAYS | {"--recipe", "--model", "--data", "--task", "--text-column", "--seq-len", "--batch-size"}
    | {"--grad-accum", "--method", "--lora-r", "--lora-alpha", "--lora-targets", "--seed", "--dtype"}
    | {"--gradient-checkpointing", "--device", "--threads", "--methods", "--rounds", "--layers", "--quick", "--output"}
    | {"--preset"},
    "doctor": ALWAYS | {"--network"},
    "models list": ALWAYS,
    "models fetch": ALWAYS | {"NAME"},
    "models verify": ALWAYS | {"NAME"},
}  # fmt: skip


def commands() -> dict[str, Any]:
    found = {}
    for name, command in typer.main.get_command(app_of()).commands.items():  # type: ignore[attr-defined]
        for sub, inner in getattr(command, "commands", {"": command}).items():
            found[f"{name} {sub}".strip()] = inner
    return found


def names(command: Any) -> set[str]:
    flags = {name for p in command.params for name in [*p.opts, *p.secondary_opts] if name.startswith("--")}
    return flags - {"--help"} | {p.metavar for p in command.params if p.param_type_name == "argument"}


def test_commands_and_flags_are_frozen() -> None:
    assert {name: names(command) for name, command in commands().items()} == SURFACE


def test_flags_of_pretrain_are_its_recipes_keys_with_its_defaults() -> None:
    assert set(PRETRAIN_FLAGS) == set(PretrainRecipe.model_fields) - {"training"}
    recipe = PretrainRecipe.from_values({"model": "m", "data": "d"})
    for key, flag in PRETRAIN_FLAGS.items():
        if flag.default and key not in (
            "tokenizer",
            "train_rows",
            "threads",
            "resume",
            "streaming",
            "load_best_model_at_end",
        ):
            assert flag.default == str(getattr(recipe, key)), key
    assert recipe.tokenizer is recipe.train_rows is recipe.threads is None
    choices = set(str(PRETRAIN_FLAGS["task"].metavar).split("|"))
    assert choices == set(PretrainRecipe.model_fields["task"].annotation.__args__)  # type: ignore[union-attr]


def test_flags_are_the_recipes_keys_with_its_defaults() -> None:
    assert set(FLAGS) == set(Recipe.model_fields) - {"training", "lora"}
    assert set(PASSED_FLAGS) == {"set", *short_keys(Recipe.sections)}
    recipe = Recipe(model="m", data="d")
    for key, flag in FLAGS.items():
        switches = ("resume", "train_auxiliary", "load_in_4bit", "load_in_8bit", "packing", "activation_offloading")
        switches += ("streaming", "trust_remote_code", "load_best_model_at_end")
        if key in ("preset", "methods", "threads", *switches) or not flag.default:
            continue
        assert flag.default == str(getattr(recipe, key)), key
    assert recipe.preset == FLAGS["preset"].default == "auto"
    assert set(FLAGS["preset"].metavar.split("|")) == set(PRESETS)
    assert STUDY_FLAGS["preset"].default == STUDIED_PRESET
    assert set(STUDY_FLAGS["preset"].metavar.split("|")) == set(PRESETS) - {"auto"}
    assert recipe.threads is None and recipe.resume is False and FLAGS["resume"].default == "no"


def test_every_choice_in_a_metavar_is_one_the_recipe_takes() -> None:
    for key in ("task", "compare", "lr_schedule", "dtype", "lora_dtype", "gradient_checkpointing"):
        choices = set(str(FLAGS[key].metavar).split("|"))
        assert choices == set(Recipe.model_fields[key].annotation.__args__), key  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [*SURFACE, "models", ""])
def test_help_teaches(name: str, call: Call) -> None:
    result = call(*name.split(), "--help")
    assert result.code == 0
    assert "Exit codes: 0 done" in result.out and "130 interrupted" in result.out
    if name != "models":
        assert f"sparsetrain {name}".strip() in result.out
    if name in ("finetune",):
        assert "Not for" in result.out and "When not to use it" in result.out


@pytest.mark.parametrize("name", SURFACE)
def test_help_has_every_flag_whole_on_80_columns(name: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = call(*name.split(), "--help").out
    words = {word for line in out.splitlines() if line.startswith("  -") for word in line.replace("/", " ").split()}
    hidden = {flag for p in commands()[name].params if getattr(p, "hidden", False) for flag in p.opts}
    assert {flag for flag in SURFACE[name] if flag.startswith("--")} <= words | hidden
    fixed = [line for line in out.splitlines() if len(line) > 80 and not line.startswith("  sparsetrain ")]
    assert not [line for line in fixed if line.startswith("  -") or line.startswith("      ")], fixed


def test_a_group_says_what_its_commands_do_and_no_arguments_ask_for_that(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for names in ([], ["models"]):
        found, asked = call(*names), call(*names, "--help")
        assert found.code == asked.code == 0 and found.out == asked.out and not found.err
        assert not [line for line in found.out.splitlines() if len(line) > 80]
    listed = call().out.splitlines()
    assert {name.partition(" ")[0] for name in SURFACE} <= {line.strip() for line in listed if line.startswith("  ")}
    assert call("--version").out == f"sparsetrain {sparsetrain.__version__}\n"
    assert "No such command 'nope'" in call("nope", "--help").err


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; sys.argv = ['sparsetrain', 'finetune', '--help']\n"
        "from sparsetrain.cli import main\n"
        "try: main()\n"
        "finally:\n"
        "  heavy = ('torch', 'transformers', 'numpy', 'yaml', 'pydantic', 'rich.markdown')\n"
        "  print('heavy:', [m for m in heavy if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    ).stdout
    assert out.splitlines()[-1] == "heavy: []"
