"""The tables of `bench deploy`, and what they say of each method: the entries `deployed` of its evidence.json."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.methods.deploy.grid import DATA, GRID, LONG, TIMES_STEPS, Arm, arms
from bench.tables.format import listed

ROOT = Path(__file__).parents[2]
PAGE = "docs/results/deploy.md"
TOLERANCE = 0.01
"""Within 1 % is a tie for one seed where neither its spread nor that of its rows is known."""
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""Seeds -> half a 95 % interval of their mean, in standard errors; 2 of more, and of held-out rows, which are many. The
expansion in `measure.intervals` is for five degrees of freedom and more."""


@dataclass(frozen=True)
class Difference:
    """Relative differences to dense LoRA, one a seed, and the standard error of their mean: of the seeds, of the
    held-out rows where there is one seed, or None."""

    values: list[float]
    error: float | None

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def text(self) -> str:
        """ "+0.6 ± 0.3 %"."""
        if not self.values:
            return "–"
        return f"{100 * self.mean:+.1f}{'' if self.error is None else f' ± {100 * self.error:.1f}'} %"

    @property
    def verdict(self) -> str:
        """Less is better; a tie is within the 95 % interval."""
        if not self.values:
            return "–"
        margin = TOLERANCE if self.error is None else STUDENT.get(len(self.values), 2) * self.error
        return "tie" if abs(self.mean) <= margin else "win" if self.mean < 0 else "loss"


@dataclass(frozen=True)
class Row:
    """One arm on one data set, as far as it is measured."""

    results: dict[str, Any]
    data: str
    name: str
    arm: Arm

    @cached_property
    def step(self) -> dict[str, Any]:
        return self.results.get(f"{self.data} {self.arm.timed_as or self.name} step", {})

    @cached_property
    def dense(self) -> dict[str, Any]:
        return self.results.get(f"{self.data} dense step", {})

    def pairs(self, kind: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """(the arm's run, the dense one) of every seed that both have."""
        found = []
        for key, own in self.results.items():
            name, _, seed = key.rpartition(" ")
            dense = self.results.get(f"{self.data} dense steps {seed}")
            if name == f"{self.data} {self.name} {kind}" and dense is not None:
                found.append((own, dense))
        return found

    def difference(self, kind: str) -> Difference:
        """Of perplexity; of the error rate where rows have a label."""
        pairs = self.pairs(kind)
        values = [_relative(own, dense) for own, dense in pairs]
        if len(values) > 1:
            return Difference(values, statistics.stdev(values) / math.sqrt(len(values)))
        return Difference(values, _error_of_rows(*pairs[0]) if pairs else None)

    def share(self, key: str) -> float | None:
        """Bytes, ours / dense."""
        return self.step[key] / self.dense[key] if key in self.step and key in self.dense else None


def _relative(own: dict[str, Any], dense: dict[str, Any]) -> float:
    if own["accuracy"] is None:
        return math.exp(own["loss"] - dense["loss"]) - 1
    return (1 - own["accuracy"]) / (1 - dense["accuracy"]) - 1


def _error_of_rows(own: dict[str, Any], dense: dict[str, Any]) -> float | None:
    """Standard error of the relative difference, from the same held-out rows on both sides; None if they are not kept.

    Of a quotient of sums (Σ d_i / Σ c_i): residuals d_i - mean · c_i, where c counts a row's targets.
    """
    if not (own.get("by_row") and dense.get("by_row")):
        return None
    labelled, counts = own["accuracy"] is not None, own["by_row"]["count"]
    key, scale = ("accuracy", 1 - dense["accuracy"]) if labelled else ("loss", 1.0)
    differences = [a - b for a, b in zip(own["by_row"][key], dense["by_row"][key], strict=True)]
    mean, n = sum(differences) / sum(counts), len(counts)
    rest = sum((d - mean * c) ** 2 for d, c in zip(differences, counts, strict=True))
    return math.sqrt(rest * n / (n - 1)) / sum(counts) / scale if n > 1 else None


def rows_of(results: dict[str, Any]) -> dict[str, list[Row]]:
    """Data -> the arms of which at least a pair of runs is there."""
    found = {
        data: [row for name, arm in arms(data).items() if (row := Row(results, data, name, arm)).pairs("steps")]
        for data in DATA
    }
    return {data: rows for data, rows in found.items() if rows}


def deploy(results: dict[str, Any]) -> list[str]:
    """A table for every data set."""
    return _tables(results, lambda name: True)


def of_spt(results: dict[str, Any]) -> list[str]:
    """The same of SPT's two modules, each alone and together."""
    return _tables(results, lambda name: name.partition(" ")[0] in ("attention", "ffn-demo", "spt"))


def _tables(results: dict[str, Any], shown: Callable[[str], bool]) -> list[str]:
    lines: list[str] = []
    for data, rows in rows_of(results["results"]).items():
        if not (of := [row for row in rows if shown(row.name)]):
            continue
        what = "error rate" if rows[0].pairs("steps")[0][0]["accuracy"] is not None else "perplexity"
        lines += [*([""] if lines else []), _setting(data, results), ""]
        lines.append(
            "| arm | step, dense / ours | peak, ours / dense | saved, ours / dense | tokens selected | seeds "
            f"| {what} against dense at equal steps | at equal time | steps in it | set-up, s | at equal time |"
        )
        lines += ["|" + " --- |" * 11, *map(_line, of)]
    return lines or ["Not measured yet: `python -m bench run deploy`."]


def _setting(data: str, results: dict[str, Any]) -> str:
    recipe, steps = DATA[data], results["settings"]["steps"] * TIMES_STEPS.get(data, 1)
    found, cells = results["results"].get(f"{data} rows", {}), results["results"]
    dense = [cells[key] for key in cells if key.startswith(f"{data} dense steps ")]
    share = found.get("target_share")
    quality = f"loss {_mean(dense, 'loss'):.3f}"
    if dense[0].get("accuracy") is not None:
        quality += f", accuracy {_mean(dense, 'accuracy'):.3f}"
    return (
        f"**{data}** ({recipe['task']}; {recipe['model']}): {steps} steps of {recipe['batch_size']} × up to "
        f"{recipe['seq_len']:,} tokens" + ("" if share is None else f", {100 * share:.0f} % of them targets") + ". "
        f"Dense LoRA: {quality} (before: {_mean([run['start'] for run in dense], 'loss'):.3f})."
    )


def _mean(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.mean(run[key] for run in runs)


def _line(row: Row) -> str:
    of_time = [own for own, _ in row.pairs("time")]
    ratio, selected = row.step.get("ratio"), row.step.get("selected_share")
    cells = [
        row.name,
        "–" if ratio is None else f"{ratio['median']:.2f} ({ratio['q1']:.2f}–{ratio['q3']:.2f})",
        *("–" if share is None else f"{share:.2f}" for share in (row.share("peak_bytes"), row.share("saved_bytes"))),
        "all" if not selected else f"{selected:.2f}",
        str(len(row.pairs("steps"))),
        row.difference("steps").text,
        row.difference("time").text,
        str(of_time[0]["steps"]) if of_time else "–",
        f"{statistics.median(own['setup_s'] for own, _ in row.pairs('steps')):.0f}",
        row.difference("time").verdict,
    ]
    return f"| {' | '.join(cells)} |"


def conclude_deploy(found: dict[str, Any]) -> str:
    if "deploy" not in found or not (rows := rows_of(found["deploy"]["results"])):
        return "Not measured yet: `python -m bench run deploy`."
    parts = []
    for data, own in rows.items():
        verdicts = {row.name: row.difference("time").verdict for row in own if row.pairs("time")}
        named = {word: [name for name, is_ in verdicts.items() if is_ == word] for word in ("win", "tie", "loss")}
        said = [f"{listed(names)} ({word})" for word, names in named.items() if names]
        parts += [f"{data}: {'; '.join(said)}"] if said else []
    return f"**The deployed dense model at equal time, beside dense LoRA's perplexity.** {'. '.join(parts)}."


def quality_deployed(found: dict[str, Any], method: str) -> str:
    """By data: the setting of a method alone that lost least at equal steps; "" where none was run."""
    said = []
    for data, rows in rows_of(found.get("deploy", {"results": {}})["results"]).items():
        own = [row for row in rows if [each["method"] for each in row.arm.methods] == [method] and row.arm.chosen]
        if data in (*GRID, LONG) and own:
            best = min(own, key=lambda row: row.difference("steps").mean)
            rate = f" at lr {best.arm.recipe['lr']:g}, dense at {DATA[data]['lr']:g}" if "lr" in best.arm.recipe else ""
            said.append(f"{best.difference('steps').text} on {data}{rate} ({best.difference('steps').verdict})")
    return f"perplexity or error rate of the deployed model {', '.join(said)}" if said else ""


def evidence(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Method -> an entry for each of its settings that was run for as many steps as dense, alone or first of several,
    on one data; with the usual dense phases.

    As `planner.quality` reads them: facts say where a result holds, the rest is beside dense LoRA. Of the further
    shapes only the long rows are evidence: the others are there to try the choice that is made from it.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    of_evidence = {data: rows for data, rows in rows_of(results["results"]).items() if data in (*GRID, LONG)}
    for data, rows in of_evidence.items():
        facts = results["results"].get(f"{data} rows")
        for row in rows:
            if facts and row.arm.methods and not row.arm.recipe and "ratio" in row.step and row.pairs("steps"):
                found.setdefault(row.arm.methods[0]["method"], []).append(_entry(row, facts))
    return found


def _entry(row: Row, facts: dict[str, Any]) -> dict[str, Any]:
    recipe, (first, *others) = DATA[row.data], row.arm.methods
    steps, times, ratio = row.difference("steps"), row.difference("time"), row.step["ratio"]["median"]
    peak, share = row.share("peak_bytes"), facts["target_share"]
    of_targets = "" if share is None else f", {100 * share:.0f} % of them targets"
    at_steps = f"{row.pairs('steps')[0][1]['steps']} steps, {_seeds(steps)}"
    at_time = f" and {times.text} at equal time" if times.values else ""
    if len(times.values) not in (0, len(steps.values)):
        at_steps += f"; at equal time {_seeds(times)}"
    what = "perplexity" if share is not None else "error rate"
    return {
        "setting": {key: value for key, value in first.items() if key != "method"},
        **({"with": others} if others else {}),
        "deployed": {
            **reach(recipe["task"], facts, row.step.get("selected_share")),
            "equal_steps": round(steps.mean, 4),
            **({"equal_time": round(times.mean, 4)} if times.values else {}),
            "speedup": round(ratio, 3),
            "peak": None if peak is None else round(peak, 3),
            "seeds": len(steps.values),
            **({"seeds_time": len(times.values)} if len(times.values) not in (0, len(steps.values)) else {}),
        },
        "text": (
            f"{what} {steps.text} at equal steps{at_time} beside dense LoRA; a step is {ratio:.2f} times as "
            f"fast ({recipe['model']} on {row.data}, up to {recipe['seq_len']:,} tokens"
            f"{of_targets}, {at_steps})"
        ),
        "from": f"{PAGE}, Deployed dense",
    }


def _seeds(found: Difference) -> str:
    return "one seed" if len(found.values) == 1 else f"{len(found.values)} seeds"


def reach(task: str, facts: dict[str, Any], selected: float | None) -> dict[str, list[Any]]:
    """Where a result holds: a judgement, of which this is the only place.

    Models of a quarter to four times the size; rows of half to twice the length; as many targets as eight rows in ten
    had, and fewer, too, where so many tokens are selected that nine rows in ten kept every target. Of plain text every
    token is a target; of labelled rows there are none to count.
    """
    found: dict[str, list[Any]] = {
        "task": [task],
        "trained": ["lora"],
        "parameters": [facts["parameters"] // 4, 4 * facts["parameters"]],
        "seq_len": [round(facts["row_of_a_token"] / 2), round(2 * facts["row_of_a_token"])],
    }
    if task == "lm":
        found["target_share"] = [0.9, 1.0]
    elif facts["target_shares"] is not None:
        low, high = facts["target_shares"]
        found["target_share"] = [0.0 if selected is not None and selected >= high else low, high]
    return found


def evidence_files(found: dict[str, Any]) -> dict[Path, str]:
    """The evidence.json of every method that the grid speaks of: its other entries as they are, and the grid's."""
    own = evidence(found["deploy"]) if "deploy" in found else {}
    files = {}
    for method, entries in own.items():
        path = ROOT / "src" / "sparsetrain" / "methods" / method / "evidence.json"
        others = [entry for entry in json.loads(path.read_text()) if "deployed" not in entry]
        files[path] = written([*others, *entries])
    return files


def written(entries: list[dict[str, Any]]) -> str:
    """An entry a paragraph: what it is of, what was measured, in words, and where."""
    texts = []
    for entry in entries:
        later = [key for key in ("with", "deployed", "text", "from") if key in entry]
        first = {key: value for key, value in entry.items() if key not in later}
        lines = [json.dumps(part, ensure_ascii=False)[1:-1] for part in (first, *({key: entry[key]} for key in later))]
        texts.append("  {" + ",\n   ".join(lines) + "}")
    return "[\n" + ",\n".join(texts) + "\n]\n"
