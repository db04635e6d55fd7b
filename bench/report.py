"""Write the docs from the result files: tables, conclusions, the README's table and picture, docs/support.md.

Also the entries `deployed` of the methods' evidence.json, from which plans and the choice of a preset are made.

What stands between `<!-- name -->` and `<!-- /name -->` is generated; the prose around it is written by hand.
"""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from bench.runner import RESULTS, ROOT, Benchmark, ResultFile, asked_of, benchmarks, cells_of
from bench.tables import CONCLUSIONS, TABLES
from bench.tables.automatic import automatic
from bench.tables.deploy import evidence_files, of_spt
from bench.tables.machines import machines
from bench.tables.mechanisms import PICTURES, mechanism, shown
from bench.tables.picture import COLOURS, picture
from bench.tables.pictures import SHEET
from bench.tables.planner import published
from bench.tables.steps import methods, registered
from bench.tables.support import support

REPO = ROOT.parent
PAGES = REPO / "docs" / "results"
METHODS = REPO / "src" / "sparsetrain" / "methods"
ORIGIN = (
    "SmolLM2 here is the embedded SmolLM2-135M-Instruct, whose weights come from a 4-bit file (Q4_1), dequantised: its "
    "losses and perplexities are comparable with one another, not with published ones."
)
NOTHING: dict[str, Any] = {"results": {}}


def write_all() -> None:
    _take_sheet()
    for path, text in pages().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(f"written: {path.relative_to(REPO)}")


def _take_sheet() -> None:
    """SparseDM's samples, from where the benchmark left them, if it ran here."""
    file = RESULTS / "sparsedm.json"
    cells = json.loads(file.read_text())["results"] if file.exists() else {}
    if (sheet := Path(cells.get("pictures", {}).get("sheet", ""))).is_file():
        shutil.copyfile(sheet, SHEET)


def pages() -> dict[Path, str]:
    """Every generated file as it should be."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))}
    tables = {name: _table(name, found) for name in TABLES}
    written: dict[Path, str] = {}
    placed: set[str] = set()
    for path in sorted(PAGES.glob("*.md")):
        own = dict(tables)
        if path.stem in CONCLUSIONS:
            own["conclusion"] = [CONCLUSIONS[path.stem](found)]
        own["pages"], own["machines"] = index(found), machines(found)
        own["published"], own["smollm2"] = published(), [ORIGIN]
        own["spt"], own["automatic"] = (table(found.get("deploy", NOTHING)) for table in (of_spt, automatic))
        written[path], names = fill(path.read_text(), own, path.name)
        placed |= names
        if "smollm2" in written[path].lower() and "smollm2" not in names:
            raise SystemExit(f"{path.name} has numbers of SmolLM2 and no place for its origin: <!-- smollm2 -->.")
    if missing := sorted(set(TABLES) - placed):
        raise SystemExit(f"no page of docs/results has a place for {', '.join(missing)}: <!-- {missing[0]} -->.")
    readme = REPO / "README.md"
    written[readme], _ = fill(readme.read_text(), {"methods": methods(found, registered())}, readme.name)
    for theme in COLOURS:
        written[REPO / "docs" / "pictures" / f"steps-{theme}.svg"] = picture(found["steps"], theme)
    for method in PICTURES:
        page = METHODS / method / "README.md"
        written[page], _ = fill(page.read_text(), {"picture": shown(method)}, f"{method}/{page.name}")
        for theme in COLOURS:
            written[REPO / "docs" / "pictures" / f"{method}-{theme}.svg"] = mechanism(method, theme)
    written[REPO / "docs" / "support.md"] = support()
    return written | evidence_files(found)


def _table(name: str, found: dict[str, Any]) -> list[str]:
    if name not in found:
        return [f"Not measured yet: `python -m bench run {name}`."]
    return with_origin(TABLES[name](found[name]), found[name], absent(name, found[name]))


def fill(text: str, tables: dict[str, list[str]], page: str) -> tuple[str, set[str]]:
    """The page with every marked place filled, and the names of the places."""
    names = re.findall(r"^<!-- (\w+) -->$", text, flags=re.M)
    for name in names:
        if name not in tables:
            raise SystemExit(f"{page} has a place for {name!r}, and no table of that name is known.")
        marked = "\n".join([f"<!-- {name} -->", *tables[name], f"<!-- /{name} -->"])
        text, count = re.subn(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, m=marked: m, text, flags=re.S)
        assert count == 1, f"{page}: {name} is marked {count} times"
    return text, set(names)


def absent(name: str, results: dict[str, Any]) -> str:
    """'12 of 33 cells measured', where some of those that a benchmark declares are not; else nothing."""
    declared = _declared().get(name)
    if declared is None:
        return ""
    known = {key: value for key, value in results.get("settings", {}).items() if key in declared.settings}
    cells = cells_of(declared, asked_of(declared, changes=known))
    file = ResultFile(declared, cells, None, declared.settings)
    file.data = results
    held = sum(file.holds(cell) for cell in cells)
    return f"{held} of {len(cells)} cells measured" if held < len(cells) else ""


@cache
def _declared() -> dict[str, Benchmark]:
    return benchmarks()


def with_origin(lines: list[str], results: dict[str, Any], part: str = "") -> list[str]:
    """The table, and below it how much of it is measured, where and at which commit."""
    machine = results.get("machine", {})
    origin = f"{machine.get('cpu', 'CPU')}, commit {machine.get('commit') or 'not recorded'}."
    origin = f"{part}. {origin}" if part else origin
    if earlier := sum(len(entry["cells"]) for entry in results.get("earlier", [])):
        origin += f" {earlier} cells are of earlier runs, named in the result file."
    return [*lines, "", origin]


def index(found: dict[str, Any]) -> list[str]:
    """A line a page: its title and its conclusion."""
    lines = []
    for name, conclude in CONCLUSIONS.items():
        title = (PAGES / f"{name}.md").read_text().partition("\n")[0].removeprefix("# ")
        lines.append(f"- [{title}]({name}.md): {conclude(found)}")
    return lines
