"""A page out of pieces: texts, tables, bars and figures as plain values, which one template draws and escapes."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TypeAlias

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from sparsetrain.measure.colours import COLOURS, css_name


@dataclass(frozen=True)
class Text:
    """A paragraph. kind: headline, advice or note; plain if none."""

    words: str
    kind: str = ""


@dataclass(frozen=True)
class Chip:
    """A short verdict in the colour of `who`."""

    who: str
    words: str


@dataclass(frozen=True)
class Heading:
    """A small heading, in the colour of `who` if there is one."""

    words: str
    chip: Chip | None = None
    who: str = ""


@dataclass(frozen=True)
class Quote:
    """Text as it was written, lines kept."""

    words: str
    kind: str = ""


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Bar:
    """One bar: a label, its parts (meaning -> length, in order), and its value in words."""

    label: str
    parts: Mapping[str, float] = field(default_factory=dict)
    value: str = ""

    @property
    def length(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Bars:
    """Bars below each other, from 0 to the longest. legend: meaning -> words."""

    rows: Sequence[Bar]
    legend: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """kind: numbers, totals, judgements or settings, several with a blank between them."""

    head: Sequence[str]
    rows: Sequence[Sequence[str | Chip]]
    kind: str = ""


@dataclass(frozen=True)
class Picture:
    """PNG bytes. kind: small for what is a few pixels wide."""

    png: bytes
    alt: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Figure:
    """A drawing with its title, its legend and what it shows; an SVG of ours is `Markup`."""

    title: str
    drawn: Bars | Picture | Markup
    caption: str
    legend: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Fold:
    """Pieces that are shown when the summary is clicked."""

    summary: str
    parts: Sequence[Piece]


@dataclass(frozen=True)
class Group:
    """Pieces side by side (`figures`, `bars`), or in a box (`sample`)."""

    kind: str
    parts: Sequence[Piece]


Piece: TypeAlias = Text | Heading | Quote | Bullets | Bars | Table | Figure | Fold | Group


@dataclass(frozen=True)
class Section:
    """name: its anchor. A section without parts is not drawn."""

    title: str
    name: str
    parts: Sequence[Piece]


def document(title: str, below: str, sections: Iterable[Section | None]) -> str:
    """A whole page: its title, a line below it, and its sections; nothing is loaded from outside."""
    shown = [section for section in sections if section is not None and section.parts]
    return _template().render(title=title, below=below, sections=shown, colours=COLOURS)


@cache
def _template() -> Template:
    loader = PackageLoader("sparsetrain.measure", "templates")
    pages = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    pages.filters |= {
        "css": css_name,
        "kind": lambda piece: type(piece).__name__,
        "base64": lambda data: b64encode(data).decode("ascii"),
    }
    return pages.get_template("page.html")
