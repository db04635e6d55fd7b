"""What a command hands back, and how it reaches the terminal: a table for people, or one JSON document for machines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

from sparsetrain.core import files


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A command's result.

    data: plain values, printed by `--json`.
    show: what a person sees, in order: strings and rich renderables. A callable is called when it is printed, so that
        `--json` never pays for a table.
    code: the exit code; `doctor` and `models verify` answer, and still end with 1 when something is missing.
    """

    data: dict[str, Any]
    show: list[Any] = field(default_factory=list)
    code: int = 0


def print_answer(answer: Answer, stdout: TextIO, as_json: bool) -> None:
    """Write an answer to `stdout`, which gets nothing else in JSON mode."""
    if as_json:
        print(to_json({"ok": answer.code == 0, **answer.data}), file=stdout)
        return
    from rich.console import Console

    console = Console(file=stdout, highlight=False, soft_wrap=True)
    for part in answer.show:
        console.print(part() if isinstance(part, Callable) else part, markup=False)


LONGEST_NAME = 32
"""Characters of a table's first column that a narrow window leaves whole."""


def to_json(value: Any) -> str:
    """JSON that any reader takes: not-a-number and infinity become null, paths and dataclasses plain values."""
    return files.to_json(value, indent=2, default=repr)


def table(title: str, columns: list[str], rows: list[list[Any]], right: tuple[int, ...] = ()) -> Any:
    """A rich table; `right` are the columns that align to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for i, name in enumerate(columns):
        # in a narrow window text wraps, and a name is not broken in two
        words = [word for row in rows for word in str(row[i]).split()] if i == 0 else []
        width = min(max(map(len, words), default=0), LONGEST_NAME) or None
        made.add_column(name, justify="right" if i in right else "left", overflow="fold", min_width=width)
    for row in rows:
        # Text, not str: brackets in a path are not markup
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return made
