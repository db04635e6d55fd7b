"""Hugging Face's names for our flags: what people have in their scripts works, spelled with - or _."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any

from sparsetrain.cli.help import Command

RENAMED: dict[str, str] = {
    "--model-name-or-path": "--model",
    "--revision": "--model-revision",
    "--dataset-name": "--data",
    "--output-dir": "--output",
    "--max-length": "--seq-len",
    "--max-seq-length": "--seq-len",
    "--dataset-text-field": "--text-column",
    "--chat-template": "--chat-template-path",
    "--per-device-train-batch-size": "--batch-size",
    "--gradient-accumulation-steps": "--grad-accum",
    "--max-steps": "--steps",
    "--num-train-epochs": "--epochs",
    "--learning-rate": "--lr",
    "--lr-scheduler-type": "--lr-schedule",
    "--warmup-ratio": "--warmup-steps",
    "--lora-target-modules": "--lora-targets",
    "--save-steps": "--save-every",
    "--save-total-limit": "--keep-checkpoints",
    "--eval-steps": "--eval-every",
    "--adam-beta1": "--beta1",
    "--adam-beta2": "--beta2",
    "--adam-epsilon": "--eps",
    "--torch-dtype": "--dtype",
}
VALUES = {"--dtype": {"bfloat16": "bf16", "float32": "fp32"}}
"""Flag -> their value -> ours."""
RENAMED_SWITCHES = {"--dataset-streaming": "--streaming"}
SWITCHES: dict[str, tuple[str, str]] = {
    "--bf16": ("--dtype", "bf16"),
    "--dora": ("--lora-variant", "dora"),
    "--use-dora": ("--lora-variant", "dora"),
    "--use-rslora": ("--lora-variant", "rslora"),
    "--gradient-checkpointing": ("--gradient-checkpointing", "non-reentrant"),
}
"""Those that stand alone, or before true or false -> our flag and its value."""
ALWAYS: dict[str, str] = {
    "--use-peft": "it trains a LoRA. --lora-r 0 trains all weights",
    "--completion-only-loss": "completions alone are targets",
    "--assistant-only-loss": "what the assistant says alone is a target",
    "--do-train": "it trains. --dry-run trains nothing",
    "--do-eval": "it is evaluated before and after training",
    "--eval-on-start": "it is evaluated before and after training",
}
"""Switches for what `finetune` does in any case -> what that is; off, they are refused."""
STRATEGIES: dict[str, tuple[str, str]] = {
    "--save-strategy": ("--save-every", "checkpoints are written every so many steps"),
    "--eval-strategy": ("--eval-every", "it is evaluated every so many steps"),
    "--logging-strategy": ("--logging-steps", "every step is recorded, and dashboards are told every so many"),
}
"""When something happens -> the flag that says it here, and how often it does."""
ELSEWHERE: dict[str, str] = {
    "--logging-dir": "tensorboard's files are in runs/ of --output, or where TENSORBOARD_LOGGING_DIR says",
    "--overwrite-output-dir": "nothing that is there is written over. Give --resume, or another --output",
}
"""Flags with a value that are not taken -> where it is said."""
REFUSED: dict[str, str] = {
    "--attn-implementation": "attention is PyTorch's, or a method's in its place",
    "--trust-remote-code": "this command runs no code that comes with a model, and models of families that "
    "transformers has need none",
}
"""Switches that are not taken -> why."""


def translated(arguments: Sequence[str], flags: Collection[str]) -> list[str]:
    """A command's arguments with Hugging Face's names in ours.

    Args:
        flags: of the command; a name is taken where it has the flag that it stands for.

    Raises:
        ValueError: a switch that is not taken; rows a device, where several ranks share a step.
    """
    found: list[str] = []
    last: list[str] = []
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        dashed = RENAMED_SWITCHES.get(name.replace("_", "-"), name.replace("_", "-"))
        if name.startswith("--") and f"--no-{dashed[2:]}" in flags:  # a switch of ours
            found.append(dashed if _truth(equals, value, rest) else f"--no-{dashed[2:]}")
        elif not name.startswith("--") or (name in flags and name not in SWITCHES):
            found.append(f"{name}{equals}{value}")
        elif dashed in ELSEWHERE and "--save-every" in flags:
            raise ValueError(f"{dashed} is not taken: {ELSEWHERE[dashed]}.")
        elif dashed in STRATEGIES and "--save-every" in flags:
            last += _by_steps(dashed, _value(equals, value, rest), arguments)
        elif dashed in REFUSED and dashed not in flags:
            if _truth(equals, value, rest):
                raise ValueError(f"{dashed} is not taken: {REFUSED[dashed]}. Leave it out.")
        elif dashed in ALWAYS and "--lora-r" in flags:
            if not _truth(equals, value, rest):
                raise ValueError(f"{dashed} false is not taken: {ALWAYS[dashed]}. Leave it out.")
        elif SWITCHES.get(dashed, ("",))[0] in flags and _stands_alone(dashed, equals, value, rest, flags):
            if _truth(equals, value, rest):
                found += SWITCHES[dashed]
        else:
            new = RENAMED.get(dashed, dashed)
            if dashed == "--per-device-train-batch-size":
                _check_alone()
            if new not in flags and (section := _section(dashed, flags)):
                found += ["--set", f"{section}={_value(equals, value, rest)}"]
            else:
                found.append(f"{new if new in flags else name}{equals}{value}")
    return _with_our_values(found + last)


def _by_steps(name: str, value: str, arguments: Sequence[str]) -> list[str]:
    """What a strategy asks for, in our flags; `steps` says nothing more than the number that goes with it."""
    ours, often = STRATEGIES[name]
    given = {part.partition("=")[0].replace("_", "-") for part in arguments}
    if value == "steps" and (name != "--eval-strategy" or given & {"--eval-steps", ours}):
        return []
    if value == "no" and name != "--logging-strategy":
        return [ours, "0"]
    best = " --load-best-model-at-end makes each new best evaluation a checkpoint." if value == "best" else ""
    raise ValueError(f"{name} {value} is not taken: {often}. Give {ours} N.{best}")


def _section(name: str, flags: Collection[str]) -> str | None:
    """The recipe's key that an unknown flag names, where the libraries have it; they are asked then alone."""
    if "--set" not in flags or not name.startswith("--"):
        return None
    from dataclasses import fields

    from peft import LoraConfig
    from transformers import TrainingArguments

    key = name[2:].replace("-", "_")
    if key in {field.name for field in fields(TrainingArguments)}:
        return f"training.{key}"
    inner = key.removeprefix("lora_")
    names = {field.name for field in fields(LoraConfig)} if inner != key or key.startswith("use_") else set()
    return next((f"lora.{one}" for one in (key, inner) if one in names), None)


def _value(equals: str, value: str, rest: list[str]) -> str:
    if equals:
        return value
    return rest.pop(0) if rest and not rest[0].startswith("--") else "true"


def _with_our_values(found: list[str]) -> list[str]:
    changed = list(found)
    for i, part in enumerate(found):
        name, equals, value = part.partition("=")
        if equals and value in VALUES.get(name, ()):
            changed[i] = f"{name}={VALUES[name][value]}"
        elif i and part in VALUES.get(found[i - 1], ()):
            changed[i] = VALUES[found[i - 1]][part]
    return changed


def _stands_alone(name: str, equals: str, value: str, rest: Sequence[str], flags: Collection[str]) -> bool:
    """Is it a switch here, and no flag of ours with a value?"""
    follows = value if equals else rest[0] if rest else "--"
    return name not in flags or follows.startswith("--") or follows.lower() in ("true", "false")


def _truth(equals: str, value: str, rest: list[str]) -> bool:
    if not equals and rest and rest[0].lower() in ("true", "false"):
        value = rest.pop(0)
    return value.lower() != "false"


def _check_alone() -> None:
    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks not in ("", "0", "1"):
        raise ValueError(
            f"--per-device-train-batch-size counts rows of one device, and a step's rows are shared by all {ranks} "
            "ranks here, so that losses do not depend on their number. Give --batch-size and --grad-accum of all ranks."
        )


class HfNames(Command):
    """A command that takes these names too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        flags = {name for parameter in self.get_params(ctx) for name in (*parameter.opts, *parameter.secondary_opts)}
        return super().parse_args(ctx, translated(args, flags))
