"""`sparsetrain plan` and `sparsetrain methods`: what a recipe would change, and what a method can be asked."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from sparsetrain.cli.answer import Answer, table
from sparsetrain.cli.flags import Debug, Json, RecipeFile, changes, takes
from sparsetrain.cli.live import to_stderr


@takes("model", "task", "preset", "methods", "seq_len")
def plan(recipe: RecipeFile = None, json: Json = False, debug: Debug = False, **flags: Any) -> Answer:
    """Show which parts of a model a recipe changes and what each costs, before and after; nothing is trained.

    Only the model's config is read (its weights stay on the meta device), so it takes seconds for any size.

    \b
    Examples:
      sparsetrain plan --model smollm2-135m --preset spt --seq-len 2048
      sparsetrain plan --model ./llama --method "routed_ffn:num_blocks=8,layers=4-9"
      sparsetrain plan --recipe run.yaml
    """
    import sparsetrain
    from sparsetrain.hf.assemble import empty_model, open_config

    asked = _recipe(recipe, changes(flags))
    if not asked.configs:
        raise ValueError(
            "The preset dense changes nothing, so there is nothing to plan. Give --method or another --preset."
        )
    _, config = open_config(asked, to_stderr, asked.configs)
    planned = sparsetrain.plan(empty_model(config, asked.task), *asked.configs, seq_tokens=asked.seq_len)
    rows = planned.rows()
    totals = {
        key: sum(row[key] for row in rows)
        for key in ("mflop_before", "mflop_after", "saved_before", "saved_after", "added_params")
    }
    data = {
        "model_class": planned.model_class,
        "family": planned.family,
        "seq_len": planned.seq_tokens,
        "edits": rows,
        "totals": totals,
        "left_dense": planned.untouched,
    }
    left = [f"Left dense by {method}: {count} of its sites." for method, count in planned.untouched.items() if count]
    title = f"{planned.model_class} ({planned.family}) at {planned.seq_tokens:,} tokens; forward, per token"
    columns = ["sites", "method", "MFLOP", "saved for backward", "added params"]
    return Answer(data=data, show=[lambda: table(title, columns, _lines(rows, totals), right=(2, 3, 4)), *left])


def _lines(rows: list[dict[str, Any]], totals: Mapping[str, float]) -> list[list[str]]:
    """Sites that differ in their layer alone share a line, with their sums; the last line is all of them."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((re.sub(r"\d+", "*", row["site"]), row["method"], row["note"]), []).append(row)
    lines = []
    for (site, method, note), same in groups.items():
        name = same[0]["site"] if len(same) == 1 else f"{len(same)} x {site}"
        lines.append(
            [
                name,
                f"{method}: {note}" if note else method,
                *_cells({key: sum(row[key] for row in same) for key in totals}),
            ]
        )
    return [*lines, ["all of these", "", *_cells(totals)]]


def _cells(sums: Mapping[str, float]) -> list[str]:
    return [
        f"{sums['mflop_before']:,.2f} -> {sums['mflop_after']:,.2f}",
        f"{sums['saved_before']:,.0f} -> {sums['saved_after']:,.0f}",
        f"{sums['added_params']:,}",
    ]


def methods(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Methods; all if none is given.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Explain the sparse methods: what each does, every key of --method NAME:KEY=VALUE, and its default.

    \b
    Example:
      sparsetrain methods routed_ffn
    """
    import dataclasses

    import sparsetrain.methods  # noqa: F401  (enters them in the registry)
    from sparsetrain.core.config import method_config, registered_methods

    kinds = [method_config(name) for name in names or registered_methods()]
    data, show = {}, []
    for kind in kinds:
        defaults = {field.name: field.default for field in dataclasses.fields(kind)}
        data[kind.method] = {"help": inspect.getdoc(kind), "keys": defaults}
        written = ",".join(f"{key}={value}" for key, value in defaults.items() if key not in ("targets", "layers"))
        common = "Every method also takes layers=0|2|5-9 (blocks, from 0) and targets=PATTERN|PATTERN (on site names)."
        show += [f"{kind.method}\n", inspect.getdoc(kind), f"\nDefaults: {kind.method}:{written}\n{common}\n"]
    return Answer(data={"methods": data}, show=show)


def _recipe(file: Any, given: dict[str, Any]) -> Any:
    from sparsetrain.hf.recipe import Recipe

    # a recipe must name its data, which a plan does not read
    return Recipe.from_yaml(file, given) if file else Recipe.from_values({"data": "not read", **given})
