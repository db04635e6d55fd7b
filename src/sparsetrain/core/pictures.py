"""Pictures as plain values: a method says what is to be seen, `measure` draws it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A square map. values: [n, n], at least 0; `kept`: cells are kept or not, rather than more or less."""

    name: str
    values: Any
    kept: bool = False


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture: rows of panels, or curves over optimizer steps (label -> points) of what `y` says.

    facts: what a table says of it, by column.
    """

    title: str
    panels: Sequence[Sequence[Panel]] = ()
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    y: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """A method's pictures of a run: a section of the report and a folder, both called `name`; files are numbered
    `item`s."""

    name: str
    heading: str
    pictures: Sequence[Picture]
    item: str = "picture"
