"""Pieces of a page: sections, figures and tables."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from sparsetrain.measure.style import STYLE


def document(title: str, below: str, sections: Iterable[str]) -> str:
    """A whole page: its title, a line below it, and sections (HTML already); nothing is loaded from outside."""
    name = escape(title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{name}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<header><h1>{name}</h1><p>{escape(below)}</p></header>\n<main>\n"
        + "\n".join(part for part in sections if part)
        + "\n</main>\n</body>\n</html>\n"
    )


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
