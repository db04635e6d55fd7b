"""`sparsetrain explain`: why a trained model decides as it does about a text or an image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsetrain.cli.answer import Answer, table
from sparsetrain.cli.flags import Debug, Json
from sparsetrain.core.files import write_whole

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's --output, or a saved model.")]
Subjects = Annotated[
    list[str], typer.Argument(metavar="IMAGE_OR_TEXT", help="A text, or an image's path; several may be given.")
]
Output = Annotated[
    Path | None, typer.Option("--output", metavar="FILE", help="The page; explanation.html in RUN if not given.")
]
Top = Annotated[int, typer.Option("--top", min=1, help="Concepts that are shown of each.")]
PAGE = "explanation.html"


def explain(
    run: Run, subjects: Subjects, output: Output = None, top: Top = 10, json: Json = False, debug: Debug = False
) -> Answer:
    """Say which concepts decided, and how they add up, as a table and an HTML page.

    For models whose method decides by named concepts (`sparsetrain methods`).

    \b
    Examples:
      sparsetrain explain runs/concepts "A dull film with wooden acting."
      sparsetrain explain runs/clothes shoe.png --output shoe.html
    """
    from sparsetrain.hf.study.explain import explain_run
    from sparsetrain.measure.explanation_page import render_explanations
    from sparsetrain.runs.places import check_file

    place = output or (Path(run) if Path(run).is_dir() else Path()) / PAGE
    check_file(place, "--output", (".html", ".htm"))
    found = explain_run(run, subjects)
    page = render_explanations(found.explanations, f"Why {run} decided so", top=top, pictures=found.pictures)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_whole(place, page)
    data = {"run": run, "explanations": [each.to_dict(top) for each in found.explanations], "page": str(place)}
    show: list[Any] = [part for each in found.explanations for part in _shown(each, top)]
    return Answer(data=data, show=[*show, f"Page: {place}"])


def _shown(each: Any, top: int) -> list[Any]:
    won, second = each.classes[each.decided], each.classes[each.runner_up]
    leads = each.leads()
    rows = [[name, f"{value:+.3f}"] for name, value in leads[:top]]
    if leads[top:]:
        rows.append([f"the other {len(leads) - top}, together", f"{sum(value for _, value in leads[top:]):+.3f}"])
    rows.append(["sum: the lead", f"{each.lead:+.3f}"])
    text = each.subject if len(each.subject) <= 300 else f"{each.subject[:299]}…"
    return [
        text,
        f"{won}, {each.probabilities[each.decided]:.0%}; next: {second}",
        lambda: table("", ["concept", f"speaks for {won} (+), for {second} (-)"], rows, right=(1,)),
        f"{each.counted()} of {len(each.concepts)} concepts add anything; {each.effective():.1f} carry it.",
        *(f"{name}: {chosen}" for name, chosen in each.also.items()),
        "",
    ]
