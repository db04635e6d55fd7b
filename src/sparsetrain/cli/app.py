"""The command line: one typer app, one command a file; every command returns an `Answer` and prints nothing itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Annotated, Any

import typer

from sparsetrain import __version__
from sparsetrain.cli.bench import bench
from sparsetrain.cli.chat import chat
from sparsetrain.cli.doctor import doctor
from sparsetrain.cli.evaluate import evaluate
from sparsetrain.cli.explain import explain
from sparsetrain.cli.export import export
from sparsetrain.cli.failure import EXIT_CODES
from sparsetrain.cli.finetune import finetune
from sparsetrain.cli.flags import PRESETS_HELP, methods_help
from sparsetrain.cli.help import Command, Group, help_text
from sparsetrain.cli.hf_names import HfNames
from sparsetrain.cli.models import MODELS_HELP, fetch, list_assets, verify
from sparsetrain.cli.patterns import patterns
from sparsetrain.cli.plan import methods, plan
from sparsetrain.cli.pretrain import pretrain
from sparsetrain.cli.profile import profile
from sparsetrain.cli.sample import sample
from sparsetrain.cli.sensitivity import sensitivity


def _tell_version(asked: bool) -> None:
    if asked:
        print(f"sparsetrain {__version__}")
        raise typer.Exit


def sparsetrain(
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_tell_version, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune and pretrain Transformers with less memory and time, through sparsity.

    \b
    Is this machine ready?
      sparsetrain doctor
    Fetch a small language model (93 MB) and train it, beside dense LoRA:
      sparsetrain models fetch smollm2-135m
      sparsetrain finetune --model smollm2-135m --data python-stdlib --compare dense

    Every command takes --json (one document on stdout; all else goes to stderr) and --debug.
    """


COMMANDS: dict[str, Callable[..., Any] | dict[str, Callable[..., Any]]] = {
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
    "models": {"list": list_assets, "fetch": fetch, "verify": verify},
}


def paragraphs(text: str) -> str:
    """The text with each paragraph on one line, for the terminal to wrap; those marked \\b keep their lines."""
    parts = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(part if part.startswith("\b") else part.replace("\n", " ") for part in parts)


def help_of(command: Callable[..., Any]) -> str:
    """A command's docstring as its help, with what stands for METHODS and PRESETS: the registry is read then alone."""
    text = paragraphs(command.__doc__ or "")
    if "\n\nMETHODS\n" in text:
        text = text.replace("\n\nMETHODS\n", f"\n\n{methods_help()}\n")
    return text.replace("\n\nPRESETS\n", f"\n\n{PRESETS_HELP}\n")


def app_of(commands: Collection[str] = tuple(COMMANDS), *, named_alone: bool = False) -> typer.Typer:
    """The app with some commands: typer makes something of every flag of all of them, which takes .2 s for the whole.

    Args:
        named_alone: each is its name and what it does, without flags, as the list of commands shows it.
    """
    made = typer.Typer(
        cls=Group, no_args_is_help=True, add_completion=False, rich_markup_mode="rich", epilog=EXIT_CODES
    )
    made.callback()(sparsetrain)
    for name in commands:
        found = COMMANDS[name]
        if not isinstance(found, dict):
            _add(made, name, found, named_alone)
            continue
        inner = typer.Typer(cls=Group, no_args_is_help=True, help=MODELS_HELP, epilog=EXIT_CODES)
        for each, command in found.items():
            _add(inner, each, command, named_alone)
        made.add_typer(inner, name=name)
    return made


def app_for(arguments: Sequence[str]) -> typer.Typer:
    """The app with what these arguments need of it."""
    first = next(iter(arguments), "--help")
    if first == "--help":
        return app_of(named_alone=True)
    return app_of([first] if first in COMMANDS else tuple(COMMANDS))


def help_asked(arguments: Sequence[str]) -> str | None:
    """The help that is asked for, of a command or, with no more than its name, of a group: to parse for that would
    import pydantic, .1 s."""
    names = list(arguments[:-1] if arguments[-1:] == ["--help"] else arguments)
    found: Any = COMMANDS
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    is_group = isinstance(found, dict)
    if found is None or not (is_group or len(names) < len(arguments)):
        return None
    command: Any = typer.main.get_command(app_of(names[:1] or tuple(COMMANDS), named_alone=is_group))
    for name in names:
        command = command.commands[name]
    return help_text(command, " ".join(["sparsetrain", *names]))


def _add(place: typer.Typer, name: str, command: Callable[..., Any], named_alone: bool) -> None:
    if named_alone:
        place.command(name, help=paragraphs(command.__doc__ or ""))(lambda: None)
        return
    kind = HfNames if name in ("finetune", "pretrain", "plan", "profile", "bench", "eval") else Command
    place.command(name, cls=kind, help=help_of(command), epilog=EXIT_CODES)(command)


def flags_of(arguments: Sequence[str]) -> set[str]:
    """The flags of the command that `arguments` begin with; none if it is no command."""
    found: Any = typer.main.get_command(app_for(arguments))
    for name in arguments:
        if name not in getattr(found, "commands", {}):
            break
        found = found.commands[name]
    return {flag for parameter in found.params for flag in parameter.opts}
