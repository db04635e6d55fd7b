"""Whether `--preset auto` takes what a full A/B would have taken: the cells `DATA auto` of `bench deploy`, beside its
runs at equal time."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from typing import Any

from bench.methods.deploy.grid import DATA, MEMORY, Arm, arms, recipe_of
from bench.tables.deploy import TOLERANCE, Row, rows_of

DENSE = "dense"


@dataclass(frozen=True)
class Pick:
    """What was taken on one data set, and the best that would have fitted.

    regret: how much worse the deployed model is at equal time than the best one's, as a share of perplexity or of the
        error rate; None where what was taken was not run.
    """

    data: str
    taken: str
    seconds: float
    best: str
    regret: float | None

    @property
    def right(self) -> bool:
        """A tie with the best counts: what is taken among ties is a matter of memory."""
        return self.taken == self.best or (self.regret is not None and self.regret <= TOLERANCE)


def picks(results: dict[str, Any]) -> list[Pick]:
    """Of every data set on which the choice was made and at least one of its arms was run at equal time."""
    found, cells = [], results["results"]
    compared = rows_of(cells)
    for data in DATA:
        rows = [row for row in compared.get(data, []) if row.arm.chosen and row.pairs("time")]
        if f"{data} auto" in cells and rows:
            found.append(_pick(data, cells[f"{data} auto"], rows, results["settings"]))
    return found


def _pick(data: str, auto: dict[str, Any], rows: list[Row], settings: dict[str, Any]) -> Pick:
    limit, differences = MEMORY.get(data), {}
    if limit is None or rows[0].dense.get("peak_bytes", 0) <= limit:
        differences[DENSE] = 0.0
    for row in rows:
        if limit is None or row.step.get("peak_bytes", 0) <= limit:
            differences[row.name] = statistics.mean(row.difference("time").values)
    best, taken = min(differences, key=differences.__getitem__), _name(data, auto, settings)
    regret = (1 + differences[taken]) / (1 + differences[best]) - 1 if taken in differences else None
    return Pick(data, taken, auto["seconds"], best, regret)


def _name(data: str, auto: dict[str, Any], settings: dict[str, Any]) -> str:
    """The arm that trains as the choice says; its own words where none does."""
    wanted = _as_text(data, auto["methods"], auto["recomputes"], settings)
    every = {DENSE: Arm(()), "dense-checkpointing": Arm((), {"gradient_checkpointing": "non-reentrant"}), **arms(data)}
    for name, arm in every.items():
        if arm.recipe.keys() <= {"gradient_checkpointing"}:  # phases and rates are no part of the choice
            again = arm.recipe.get("gradient_checkpointing", "none") != "none"
            if _as_text(data, list(arm.methods), again, settings) == wanted:
                return name
    return auto["taken"]


def _as_text(data: str, methods: list[dict[str, Any]], recomputes: bool, settings: dict[str, Any]) -> str:
    from sparsetrain.recipes.finetune import Recipe

    recipe = Recipe.from_values({**recipe_of(data, None, settings), "methods": methods})
    return json.dumps([[config.to_dict() for config in recipe.configs], recomputes], sort_keys=True)


def automatic(results: dict[str, Any]) -> list[str]:
    """A line a data set, and how many were right."""
    if not results["results"] or not (found := picks(results)):
        return ["Not measured yet: `python -m bench run deploy --cells '*auto'`, and the runs at equal time."]
    lines = ["| data | taken | seconds it took | best at equal time | the taken one, beside the best | |"]
    lines.append("|" + " --- |" * 6)
    for pick in found:
        beside = "not run" if pick.regret is None else f"{100 * pick.regret:+.1f} %"
        verdict = "right" if pick.right else "wrong"
        lines.append(f"| {pick.data} | {pick.taken} | {pick.seconds:.0f} | {pick.best} | {beside} | {verdict} |")
    right = sum(pick.right for pick in found)
    return [*lines, "", f"{right} of {len(found)} are what the runs would have taken, or within 1 % of it."]
