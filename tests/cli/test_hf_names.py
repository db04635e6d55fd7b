"""Scripts written for transformers and TRL find their names here."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from sparsetrain.cli.app import app_of
from sparsetrain.cli.hf_names import ALWAYS, ELSEWHERE, REFUSED, RENAMED, STRATEGIES, SWITCHES, translated
from tests.cli.conftest import Call

FLAGS = {
    "--lr",
    "--dtype",
    "--gradient-checkpointing",
    "--batch-size",
    "--lora-variant",
    "--model",
    "--resume",
    "--no-resume",
}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("--learning_rate 1 --model x", "--lr 1 --model x"),
        ("--learning-rate=1", "--lr=1"),
        ("--batch_size 2", "--batch-size 2"),
        ("--bf16", "--dtype bf16"),
        ("--bf16 true --lr 1", "--dtype bf16 --lr 1"),
        ("--bf16 False --lr 1", "--lr 1"),
        ("--bf16=false", ""),
        ("--use_dora", "--lora-variant dora"),
        ("--dora", "--lora-variant dora"),
        ("--dtype bfloat16", "--dtype bf16"),
        ("--torch_dtype=float32", "--dtype=fp32"),
        ("--model bfloat16", "--model bfloat16"),
        ("--gradient_checkpointing --lr 1", "--gradient-checkpointing non-reentrant --lr 1"),
        ("--gradient-checkpointing", "--gradient-checkpointing non-reentrant"),
        ("--gradient-checkpointing reentrant", "--gradient-checkpointing reentrant"),
        ("--gradient_checkpointing=none", "--gradient-checkpointing=none"),
        ("--no_such_thing 1", "--no_such_thing 1"),
        ("--max-steps 3", "--max-steps 3"),  # a command without --steps
        ("--resume learning_rate", "--resume learning_rate"),
        ("--resume True --lr 1", "--resume --lr 1"),
        ("--resume=false", "--no-resume"),
        ("--no-resume", "--no-resume"),
    ],
)
def test_names_become_ours(given: str, found: str) -> None:
    assert translated(given.split(), FLAGS) == found.split()


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("--neftune-noise-alpha 5 --lr 1", "--set training.neftune_noise_alpha=5 --lr 1"),
        ("--torch_compile --lr 1", "--set training.torch_compile=true --lr 1"),
        ("--eval-strategy=steps", "--set training.eval_strategy=steps"),  # a command that saves nothing
        ("--logging_steps 10 --lr 1", "--set training.logging_steps=10 --lr 1"),
        ("--lora-modules-to-save norm", "--set lora.modules_to_save=norm"),
        ("--use_qalora", "--set lora.use_qalora=true"),
        ("--no_such_thing 1", "--no_such_thing 1"),
        ("--use_peft --assistant_only_loss true --lr 1", "--lr 1"),
    ],
)
def test_any_key_of_the_libraries_is_a_flag(given: str, found: str) -> None:
    assert translated(given.split(), FLAGS | {"--set", "--lora-r"}) == found.split()


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("--save_strategy steps --save_steps 9", "--save-every 9"),
        ("--save-strategy=no --save-every 9 --lr 1", "--save-every 9 --lr 1 --save-every 0"),  # the last one counts
        ("--eval_strategy steps --eval_steps=9", "--eval-every=9"),
        ("--eval-strategy no", "--eval-every 0"),
        ("--logging-strategy steps --logging-first-step", "--set training.logging_first_step=true"),
        ("--do_train --do_eval True --eval_on_start --lr 1", "--lr 1"),
    ],
)
def test_strategies_become_numbers_of_steps(given: str, found: str) -> None:
    flags = FLAGS | {"--set", "--lora-r", "--save-every", "--eval-every"}
    assert translated(given.split(), flags) == found.split()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("--save-strategy epoch", "Give --save-every N"),
        ("--save_strategy best", "--load-best-model-at-end"),
        ("--eval-strategy epoch", "Give --eval-every N"),
        ("--eval-strategy steps", "Give --eval-every N"),
        ("--logging-strategy no", "Give --logging-steps N"),
        ("--logging_dir x", "TENSORBOARD_LOGGING_DIR"),
        ("--overwrite_output_dir", "Give --resume"),
    ],
)
def test_what_is_said_elsewhere_is_refused_with_the_place(given: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        translated(given.split(), FLAGS | {"--set", "--lora-r", "--save-every", "--eval-every"})


def test_what_a_run_does_in_any_case_cannot_be_switched_off() -> None:
    with pytest.raises(ValueError, match="completions alone are targets"):
        translated(["--completion-only-loss=false"], FLAGS | {"--lora-r"})


def test_a_name_stands_for_a_flag_that_there_is() -> None:
    commands = typer.main.get_command(app_of()).commands  # type: ignore[attr-defined]
    flags = {name for command in ("finetune", "pretrain") for p in commands[command].params for name in p.opts}
    assert set(RENAMED.values()) | {flag for flag, _ in SWITCHES.values()} <= flags
    assert not (RENAMED.keys() | SWITCHES.keys()) & (flags - {"--gradient-checkpointing"})


def test_code_of_a_model_is_not_asked_for_by_accident() -> None:
    assert translated(["--trust_remote_code", "false", "--lr", "1"], FLAGS) == ["--lr", "1"]
    for given in (["--trust-remote-code"], ["--trust_remote_code=True"]):
        with pytest.raises(ValueError, match="this command runs no code that comes with a model"):
            translated(given, FLAGS)


def test_the_page_for_people_who_come_from_there_has_every_name() -> None:
    page = (Path(__file__).parents[2] / "docs/from-trl.md").read_text()
    assert not [
        name for name in (*RENAMED, *SWITCHES, *ALWAYS, *REFUSED, *STRATEGIES, *ELSEWHERE) if f"`{name}`" not in page
    ]


def test_rows_of_a_device_are_not_taken_for_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="all 2 ranks"):
        translated(["--per_device_train_batch_size", "4"], FLAGS)


def test_a_command_line_of_trl_is_understood(call: Call, llama: Path, text: Path, tmp_path: Path) -> None:
    line = f"finetune --model_name_or_path {llama} --dataset_name {text} --output_dir {tmp_path / 'run'} --max_steps 7"
    line += " --max_length 32 --learning_rate 1e-3 --per_device_train_batch_size 2 --gradient_accumulation_steps 3"
    line += " --use_rslora --optim adafactor --lora_dropout 0.1 --label_smoothing_factor 0.1 --use_peft"
    line += " --preset dense --device cpu --bf16 --dry-run --json"
    result = call(*line.split(), "--set", "lora.rank_pattern={q_proj: 4}")
    assert result.code == 0, result.err
    made = result.json["recipe"]
    assert (made["steps"], made["seq_len"], made["lr"], made["batch_size"], made["grad_accum"]) == (7, 32, 1e-3, 2, 3)
    assert made["dtype"] == "bf16" and made["training"] == {"label_smoothing_factor": 0.1, "optim": "adafactor"}
    assert made["lora"] == {"rank_pattern": {"q_proj": 4}, "lora_dropout": 0.1, "use_rslora": True}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("max_steps=3", "unknown section 'max_steps'"),
        ("training.max_steps=3", "by steps (--steps)"),
        ("training.optm=sgd", "Did you mean 'optim'"),
        ("training.optim=sdg", "Did you mean 'sgd'"),
        ("training.optim=adalomo", "no gradient is left"),
        ("training.label_smoothing_factor=much", "Give what is a float"),
        ("training.torch_compile=1", "Give what is a bool"),
        ("training.lr_scheduler_type=polynom", "Did you mean 'polynomial'"),
        ("training.report_to=tensorbored", "Did you mean 'tensorboard'"),
        ("lora.use_dorra=true", "Did you mean 'use_dora'"),
        ("lora.lora_dropout=2", "out of range"),
        ("lora.bias=some", "Literal"),
        ("lora.init_lora_weights=pissa_niter_4", "another"),
        ("lora.init_lora_weights=loftq", "quantised"),
    ],
)
def test_what_cannot_be_passed_on_is_told_before_training(
    call: Call, llama: Path, text: Path, tmp_path: Path, asked: str, words: str
) -> None:
    usual = ["--model", llama, "--data", text, "--output", tmp_path / "run", "--preset", "dense", "--seq-len", 32]
    result = call("finetune", *usual, "--steps", 2, "--device", "cpu", "--dtype", "fp32", "--set", asked)
    assert result.code == 2 and words in result.err and not (tmp_path / "run").exists(), result.err
