"""Tables of SaRA, PST and Monarch: each arm beside its baseline, over the seeds that are measured."""

from __future__ import annotations

import statistics
from typing import Any

from bench.tables.format import signed, spread

DASH = "–"


def seeds_of(cells: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> seed -> cell, of the cells whose key ends in a seed."""
    found: dict[str, dict[str, Any]] = {}
    for key, cell in cells.items():
        name, _, seed = key.rpartition(" ")
        if seed.isdigit():
            found.setdefault(name, {})[seed] = cell
    return found


def beside(own: dict[str, Any], other: dict[str, Any], key: str) -> str:
    """Differences in `key`, seed by seed; a dash where no seed has both."""
    pairs = [(own[seed][key], other[seed][key]) for seed in own if seed in other]
    return signed([a - b for a, b in pairs]) if pairs else DASH


def mean_of(runs: dict[str, Any], key: str) -> str:
    values = [run[key] for run in runs.values() if run.get(key) is not None]
    return spread(values) if values else DASH


def head(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]


def line(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def sara(results: dict[str, Any]) -> list[str]:
    """Memory, a step in turns, and the loss of every arm."""
    cells, lines = results["results"], []
    memory = {name: cells[f"memory {name}"] for name in ("full", "sara", "sara rows") if f"memory {name}" in cells}
    if memory:
        lines += head("trains", "optimizer state and gradients, MB", "of full fine-tuning's", "peak, MB", "planned")
        for name, cell in memory.items():
            held, peak = cell["measured"]["optimizer"] + cell["measured"]["gradients"], cell["measured"]["peak"]
            full = memory.get("full", cell)["measured"]
            of_full = held / (full["optimizer"] + full["gradients"])
            planned = f"{cell['predicted']['peak'] / peak - 1:+.1%}"
            lines.append(line(name, f"{held / 1e6:,.0f}", f"{of_full:.3f}", f"{peak / 1e6:,.0f}", planned))
    timed = {name: cell["ratio"] for name, cell in cells.items() if name.startswith("step ")}
    for name, ratio in timed.items():
        text = f"{ratio['median']:.2f} ({ratio['q1']:.2f}–{ratio['q3']:.2f})"
        lines += ["", f"Full fine-tuning's step / that of {name.removeprefix('step ')}: {text}."]
    runs = seeds_of(cells)
    for data in dict.fromkeys(name.partition(" ")[0] for name in runs):
        lines += ["", f"**{data}**, {results['settings']['steps']} steps", ""]
        lines += head("arm", "numbers trained", "highest rate", "seeds", "held-out loss", "less LoRA's", "step, s")
        for name, own in runs.items():
            if name.partition(" ")[0] == data:
                some = next(iter(own.values()))
                less = beside(own, runs.get(f"{data} lora", {}), "loss")
                took = f"{statistics.median(run['step_s'] for run in own.values()):.2f}"
                arm, rate = name.partition(" ")[2], f"{some['lr']:.1e}"
                lines.append(line(arm, f"{some['trained']:,}", rate, len(own), mean_of(own, "loss"), less, took))
    return lines


def pst(results: dict[str, Any]) -> list[str]:
    """Bytes of a linear, then the pruned models."""
    cells = results["results"]
    linears = {key: cell for key, cell in cells.items() if key.startswith("linear ")}
    lines = []
    if linears:
        lines += head("linear", "bytes kept, PST / LoRA", "plain equation / LoRA")
        for key, cell in linears.items():
            plain = f"{cell['plain'] / cell['lora']:.2f}"
            lines.append(line(key.removeprefix("linear "), f"{cell['pst_of_lora']:.2f}", plain))
    runs = {name: own for name, own in seeds_of(cells).items() if " rate" not in name}
    for model in dict.fromkeys(name.partition(" ")[0] for name in runs):
        own = {name.partition(" ")[2]: found for name, found in runs.items() if name.partition(" ")[0] == model}
        some = next(iter(next(iter(own.values())).values()))
        metric = "accuracy" if some["accuracy"] is not None else "perplexity"
        lines += ["", f"**{model}**, {some['steps']} steps", ""]
        lines += head("kept", "way", "seeds", metric, "less PST's", "zeros", "numbers trained", "of movement's")
        for name, found in own.items():
            keep, _, way = name.partition(" ")
            run = next(iter(found.values()))
            moved = own.get(f"{keep} movement", {})
            share = f"{run['trained'] / next(iter(moved.values()))['trained']:.1%}" if moved else DASH
            less = DASH if way == "pst" else beside(found, own.get(f"{keep} pst", {}), metric)
            zeros = f"{run['zero_ratio']:.1%}"
            lines.append(line(keep, way, len(found), mean_of(found, metric), less, zeros, f"{run['trained']:,}", share))
    return lines


def monarch(results: dict[str, Any]) -> list[str]:
    """Runs from random weights by task, and the projected MiniLM."""
    cells, lines = results["results"], []
    runs = seeds_of(cells)
    tasks = dict.fromkeys(name.partition(" ")[0] for name in runs if not name.startswith("minilm"))
    for task in tasks:
        steps = {arm: cells[f"{task} {arm} step"] for arm in ("monarch", "small") if f"{task} {arm} step" in cells}
        said = [f"{arm} {found['median']:.2f}" for arm, found in steps.items()]
        lines += [f"**{task}**; a dense step / the arm's: {', '.join(said) or 'not timed'}", ""]
        lines += head("arm", "steps", "seeds", "parameters", "held-out loss", "less dense's at its steps")
        for name, own in runs.items():
            if name.partition(" ")[0] == task:
                some = next(iter(own.values()))
                less = beside(own, runs.get(f"{task} dense steps", {}), "loss")
                arm = name.partition(" ")[2].replace(" steps", ", equal steps").replace(" time", ", equal time")
                given = (len(own), f"{some['parameters']:,}", mean_of(own, "loss"), less)
                lines.append(line(arm, some["steps"], *given))
        lines.append("")
    if d2s := runs.get("minilm d2s"):
        lines += head("MiniLM's accuracy on reviews", "seeds", "mean")
        words = {"dense": "dense", "monarch_after_conversion": "projected to half of its weights"}
        words |= {"monarch_after_training": "after one more epoch"}
        words |= {"dense_after_training": "the dense model after that epoch"}
        lines += [line(text, len(d2s), mean_of(d2s, key)) for key, text in words.items()]
    return lines


def monarch_products(results: dict[str, Any]) -> list[str]:
    """Forward + backward of single linears, by layout of the tokens."""
    lines = head("linear", "tokens", "blocks", "dtype", "dense / Monarch", "columns", "verdict")
    for run in results["results"]:
        shape, spread = run["shape"], f"{run['ratio_median']:.2f} ({run['ratio_q1']:.2f} to {run['ratio_q3']:.2f})"
        given = (shape["name"].replace("->", " → "), f"{shape['tokens']:,}", shape["blocks"], run["dtype"], spread)
        lines.append(line(*given, f"{run['columns_ratio']:.2f}", run["verdict"]))
    return lines


def conclude_sara(found: dict[str, Any]) -> str:
    runs = seeds_of(found["sara"]["results"]) if "sara" in found else {}
    said = []
    for data in (name.removesuffix(" sara") for name in runs if name.endswith(" sara")):
        own = runs[f"{data} sara"]
        others = {arm: runs[f"{data} {arm}"] for arm in ("lora", "full", "shira") if f"{data} {arm}" in runs}
        less = [f"{beside(own, other, 'loss')} ({arm})" for arm, other in others.items()]
        said += [f"{data}: {', '.join(less)}"] if less else []
    told = [f"**SaRA's held-out loss less that of others at equal steps.** {'; '.join(said)}."] if said else []
    cells = found["sara"]["results"] if "sara" in found else {}
    if {"memory full", "memory sara", "step sara"} <= cells.keys():
        full, own = (cells[f"memory {name}"]["measured"] for name in ("full", "sara"))
        held = (own["optimizer"] + own["gradients"]) / (full["optimizer"] + full["gradients"])
        faster = cells["step sara"]["ratio"]["median"]
        told.append(
            f"**Memory and time beside full fine-tuning**: {held:.3f} of its optimizer state and gradients, "
            f"{own['peak'] / full['peak']:.2f} of its peak, a step {faster:.2f}× as fast."
        )
    return " ".join(told) or "Not measured yet: `python -m bench run sara`."


def step_sara(found: dict[str, Any]) -> str | None:
    """A step of full fine-tuning's time over SaRA's, which has no LoRA beside it."""
    cell = found.get("sara", {"results": {}})["results"].get("step sara")
    return cell and f"{cell['ratio']['median']:.2f}, {cell['ratio']['verdict']}, beside full fine-tuning"


def conclude_pst(found: dict[str, Any]) -> str:
    runs = seeds_of(found["pst"]["results"]) if "pst" in found else {}
    said = []
    for name, own in runs.items():
        model, _, rest = name.partition(" ")
        if rest.endswith(" pst"):
            metric = "accuracy" if next(iter(own.values()))["accuracy"] is not None else "perplexity"
            keep = rest.removesuffix(" pst")
            less = [
                f"{beside(own, runs.get(f'{model} {keep} {way}', {}), metric)} ({way})"
                for way in ("magnitude", "movement")
            ]
            said.append(f"{model}, {keep} kept, {metric}: {', '.join(less)}")
    if not said:
        return "Not measured yet: `python -m bench run pst`."
    return f"**PST less other ways to prune at equal steps.** {'; '.join(said)}."


def conclude_monarch(found: dict[str, Any]) -> str:
    runs = seeds_of(found["monarch_quality"]["results"]) if "monarch_quality" in found else {}
    tasks = [name.removesuffix(" dense steps") for name in runs if name.endswith(" dense steps")]
    said = []
    for task in tasks:
        for kind in ("steps", "time"):
            own = {arm: runs.get(f"{task} {arm} {kind}", {}) for arm in ("monarch", "s2d", "small")}
            parts = [
                f"{beside(cells, runs[f'{task} dense steps'], 'loss')} ({arm})" for arm, cells in own.items() if cells
            ]
            said += [f"{task} at equal {kind}: {', '.join(parts)}"] if parts else []
    if not said:
        return "Not measured yet: `python -m bench run monarch_quality`."
    return f"**Held-out loss less dense's.** {'; '.join(said)}."
