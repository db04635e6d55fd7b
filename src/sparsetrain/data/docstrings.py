"""Prompts with completions out of Python sources: a function in its file, and the docstring that its author wrote.

Long prompts with short completions, on real code, wherever there is a Python: what fine-tuning on instructions is like.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from sparsetrain.data.files import walk_files

CONTEXT, LONGEST = 3200, 6000
"""Characters of the file before a function shown with it where nothing else is asked, and of a function at most."""
SHORTEST_DOC, LONGEST_DOC = 60, 800
"""Characters of a docstring: shorter ones say nothing, longer ones are manuals."""
ASKED = "Write the docstring of the last function.\n\n"


def docstring_rows(root: Path, context: int = CONTEXT) -> list[dict[str, str]]:
    """{prompt, completion} of every function below a folder that has a docstring, in the order of files and lines.

    Tests and installed packages are left out, and so is a function that stands twice.

    Args:
        context: characters of its file that stand before a function at most.
    """
    rows: dict[str, dict[str, str]] = {}
    for path in walk_files(root, leave_out=("site-packages", "dist-packages", "test", "tests", "idlelib")):
        if path.suffix == ".py":
            for row in _rows_of(path, context):
                rows.setdefault(row["prompt"], row)
    return list(rows.values())


def _rows_of(path: Path, context: int) -> Iterator[dict[str, str]]:
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in old sources
            tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError):
        return
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        doc, own = ast.get_docstring(node, clean=False), node.body[0]
        if doc is None or own.end_lineno == node.end_lineno:  # without a body there is nothing to describe
            continue
        doc = inspect.cleandoc(doc)
        first = min([node.lineno, *(each.lineno for each in node.decorator_list)]) - 1
        body = "".join([*lines[first : own.lineno - 1], *lines[own.end_lineno : node.end_lineno]])
        if SHORTEST_DOC <= len(doc) <= LONGEST_DOC and len(body) <= LONGEST:
            before = "".join(lines[:first])[-context:].partition("\n")[2] if first else ""
            yield {"prompt": f"{ASKED}{before}{textwrap.dedent(body)}".rstrip(), "completion": doc}
