"""`sparsetrain patterns`: what the methods of a run have to show: block patterns, flip rates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsetrain.cli.answer import Answer, table
from sparsetrain.cli.flags import Debug, Json

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's --output, one of its checkpoints, or a saved model.")]
Output = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="Where to write; a folder in RUN if not given.")
]


def patterns(run: Run, output: Output = None, json: Json = False, debug: Debug = False) -> Answer:
    """Draw what the methods of a run have to show, as PNG: attention maps and kept blocks, flip rates of masks.

    Without --output, a finished run's report.html gets them too. While a run is still dense, its last probe is shown.

    \b
    Examples:
      sparsetrain patterns runs/pretrain
      sparsetrain patterns runs/pretrain/checkpoint-2000 --output pictures
    """
    from sparsetrain.runs.pictures import draw_pictures
    from sparsetrain.runs.places import check_folder

    if output is not None:
        check_folder(output, "--output")
    galleries, files = draw_pictures(run, output)
    facts = [dict(picture.facts) for gallery in galleries for picture in gallery.pictures if picture.facts]
    columns = list(facts[0]) if facts else []
    rows = [[_cell(row.get(name)) for name in columns] for row in facts]
    heads = [name.replace("_", " ") for name in columns]
    shown = [lambda: table("", heads, rows, right=tuple(range(1, len(heads))))] if facts else []
    return Answer(data={"layers": facts, "files": files}, show=[*shown, *(f"Wrote {file}" for file in files)])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if isinstance(value, float) else str(value)
