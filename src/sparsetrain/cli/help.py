"""A command's --help: each flag whole on a line of its own, what it means below, at any width.

typer's tables cut long names at 80 columns, and take .3 s to draw seventy flags and to import what draws them.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from typer.core import TyperCommand, TyperGroup

from sparsetrain.cli.failure import EXIT_CODES

_MARKUP = re.compile(r"\[(?:bold|cyan|/)\]")
WIDEST = 100


class Command(TyperCommand):
    """A command with this help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(help_text(self, ctx.command_path))


class Group(TyperGroup):
    """Commands under one name with this help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(help_text(self, ctx.command_path))


def help_text(command: Any, path: str) -> str:
    """The help of a command or of a group of them; path: as it is called."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    commands: dict[str, Any] = getattr(command, "commands", {})
    takes = "COMMAND" if commands else "".join(f" {p.metavar}" for p in command.params if _is_argument(p)).strip()
    lines = [f"Usage: {path} [OPTIONS] {takes}".rstrip(), "", *_paragraphs(command.help or "", width)]
    if commands:
        lines.append(_bold("Commands"))
        for name, each in commands.items():
            lines += [f"  {_bold(name)}", *_wrapped((each.help or "").partition("\n\n")[0], width)]
        lines += ["", f"`{path} COMMAND --help` says what one takes.", ""]
    panels: dict[str, list[Any]] = {}
    for parameter in command.params:
        if not getattr(parameter, "hidden", False) and (parameter.help or not _is_argument(parameter)):
            default = "Arguments" if _is_argument(parameter) else "Options"
            panels.setdefault(parameter.rich_help_panel or default, []).append(parameter)
    for panel, parameters in panels.items():
        lines += [_bold(panel), *(line for each in parameters for line in _lines(each, width)), ""]
    lines += textwrap.wrap(EXIT_CODES, width)
    return "\n".join(lines) + "\n"


def _paragraphs(text: str, width: int) -> Iterator[str]:
    for paragraph in _MARKUP.sub("", text).split("\n\n"):
        if paragraph.startswith("\b"):
            yield from paragraph.split("\n")[1:]
        else:
            yield from textwrap.wrap(paragraph, width, break_on_hyphens=False)
        yield ""


def _wrapped(text: str, width: int) -> list[str]:
    """What stands below a name."""
    indent = " " * 6
    text = _MARKUP.sub("", text)
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _lines(parameter: Any, width: int) -> Iterator[str]:
    names = " / ".join(["/".join(parameter.opts), *parameter.secondary_opts])
    if _is_argument(parameter):
        yield _bold(f"  {parameter.metavar}")
    else:
        takes = "" if parameter.is_flag else f" {parameter.metavar or 'TEXT'}"
        yield f"  {_bold(names)}{takes}"
    says = parameter.help or ""
    shown = parameter.show_default
    default = shown if isinstance(shown, str) else parameter.default if shown else None
    if default is not None and not isinstance(default, bool) and not callable(default):
        says += f" [default: {default}]"
    yield from _wrapped(says, width)


def _is_argument(parameter: Any) -> bool:
    return parameter.param_type_name == "argument"


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text
