"""The command line: one typer app, one command a file; every command returns an `Answer` and prints nothing itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import typer

from sparsetrain.cli.bench import bench
from sparsetrain.cli.chat import chat
from sparsetrain.cli.doctor import doctor
from sparsetrain.cli.evaluate import evaluate
from sparsetrain.cli.explain import explain
from sparsetrain.cli.export import export
from sparsetrain.cli.failure import EXIT_CODES
from sparsetrain.cli.finetune import finetune
from sparsetrain.cli.hf_names import HfNames
from sparsetrain.cli.models import MODELS_HELP, fetch, list_assets, verify
from sparsetrain.cli.patterns import patterns
from sparsetrain.cli.plan import methods, plan
from sparsetrain.cli.pretrain import pretrain
from sparsetrain.cli.profile import profile
from sparsetrain.cli.sample import sample
from sparsetrain.cli.sensitivity import sensitivity

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", epilog=EXIT_CODES)


@app.callback()
def sparsetrain() -> None:
    """Fine-tune and pretrain Transformers with less memory and time, through sparsity.

    \b
    Is this machine ready?
      sparsetrain doctor
    Fetch a small language model (93 MB) and train it, beside dense LoRA:
      sparsetrain models fetch smollm2-135m
      sparsetrain finetune --model smollm2-135m --data python-stdlib --compare dense

    Every command takes --json (one document on stdout; all else goes to stderr) and --debug.
    """


def paragraphs(text: str) -> str:
    """The text with each paragraph on one line, for the terminal to wrap; those marked \\b keep their lines."""
    parts = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(part if part.startswith("\b") else part.replace("\n", " ") for part in parts)


def _add(place: typer.Typer, name: str, command: Callable[..., Any]) -> None:
    kind = HfNames if name in ("finetune", "pretrain", "plan", "profile", "bench", "eval") else None
    place.command(name, cls=kind, help=paragraphs(command.__doc__ or ""), epilog=EXIT_CODES)(command)


for _name, _command in {
    "finetune": finetune,
    "pretrain": pretrain,
    "eval": evaluate,
    "chat": chat,
    "explain": explain,
    "export": export,
    "sample": sample,
    "plan": plan,
    "sensitivity": sensitivity,
    "methods": methods,
    "patterns": patterns,
    "profile": profile,
    "bench": bench,
    "doctor": doctor,
}.items():
    _add(app, _name, _command)

models = typer.Typer(no_args_is_help=True, help=MODELS_HELP, epilog=EXIT_CODES)
for _name, _command in {"list": list_assets, "fetch": fetch, "verify": verify}.items():
    _add(models, _name, _command)
app.add_typer(models, name="models")


def flags_of(arguments: Sequence[str]) -> set[str]:
    """The flags of the command that `arguments` begin with; none if it is no command."""
    found: Any = typer.main.get_command(app)
    for name in arguments:
        if name not in getattr(found, "commands", {}):
            break
        found = found.commands[name]
    return {flag for parameter in found.params for flag in parameter.opts}
