"""Pieces of a page: sections, figures and tables."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


def section(title: str, name: str, *parts: str) -> str:
    """A section; its parts are HTML already."""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def figure(title: str, drawn: str, caption: str, legend: str = "") -> str:
    """A drawing (HTML already) with its title, its legend and what it shows."""
    words = f"<figcaption>{escape(caption)}</figcaption>"
    return f"<figure><h3>{escape(title)}</h3>{legend}{drawn}{words}</figure>"


def table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """Cells are HTML already; the head is text."""
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    top = f"<thead><tr>{titles}</tr></thead>" if titles else ""
    return f'<div class="table"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'
