"""Tables of SparseDM and of the concept bottleneck."""

from __future__ import annotations

import statistics
from typing import Any

from bench.tables.format import spread
from bench.tables.linears import DASH, beside, head, line, mean_of, seeds_of


def percent(runs: dict[str, Any], key: str, digits: int = 1) -> str:
    values = [100 * run[key] for run in runs.values() if key in run]
    return f"{statistics.mean(values):.{digits}f} %" if values else DASH


def sparsedm(results: dict[str, Any]) -> list[str]:
    """Every arm beside dense training of as many further steps."""
    runs = seeds_of(results["results"])
    lines = head("arm", "seeds", "FID", "over dense's", "KID", "noise loss", "multiply-adds saved", "step, of dense's")
    for arm, own in runs.items():
        if arm == "start":
            continue
        dense = runs.get("dense", {})
        ratios = [own[seed]["fid"] / dense[seed]["fid"] - 1 for seed in own if seed in dense]
        over = f"{100 * statistics.mean(ratios):+.1f} %" if ratios else DASH
        steps = [own[s]["step_s"] / dense[s]["step_s"] for s in own if s in dense and "step_s" in own[s]]
        step = f"{statistics.mean(steps):.2f}" if steps else DASH
        cells = (mean_of(own, "fid"), over, mean_of(own, "kid"), mean_of(own, "noise_loss"), percent(own, "macs_saved"))
        lines.append(line(arm, len(own), *cells, step))
    return lines


def concepts(results: dict[str, Any]) -> list[str]:
    """By data: accuracy, exact zeros, and how many concepts a decision uses."""
    runs, lines = seeds_of(results["results"]), []
    for data in dict.fromkeys(name.partition(" ")[0] for name in runs):
        lines += [*([""] if lines else []), f"**{data}**", ""]
        lines += head("arm", "seeds", "accuracy", "zero weights", "zero activations", "concepts that add", "that carry")
        for name, own in runs.items():
            if name.partition(" ")[0] == data:
                counts = [_mean(own, key) for key in ("concepts_that_add", "concepts_that_carry")]
                zeros = [percent(own, key) for key in ("zero_weights", "zero_activations")]
                lines.append(line(name.partition(" ")[2], len(own), _accuracy(own), *zeros, *counts))
    return lines


def _accuracy(runs: dict[str, Any]) -> str:
    mean, *error = spread([100 * run["accuracy"] for run in runs.values()]).split(" ± ")
    return " ± ".join(f"{float(part):.1f}" for part in (mean, *error)) + " %"


def _mean(runs: dict[str, Any], key: str) -> str:
    values = [run[key] for run in runs.values() if run.get(key) is not None]
    return f"{statistics.mean(values):.1f}" if values else DASH


def conclude_sparsedm(found: dict[str, Any]) -> str:
    runs = seeds_of(found["sparsedm"]["results"]) if "sparsedm" in found else {}
    arms = [arm for arm in runs if arm not in ("start", "dense") and set(runs[arm]) & set(runs.get("dense", {}))]
    if not arms:
        return "Not measured yet: `python -m bench run sparsedm`."
    said = [f"{beside(runs[arm], runs['dense'], 'fid')} ({arm})" for arm in arms]
    return f"**FID less that of dense training of as many steps, with half of the masked products.** {', '.join(said)}."


def conclude_concepts(found: dict[str, Any]) -> str:
    runs = seeds_of(found["concept_bottleneck"]["results"]) if "concept_bottleneck" in found else {}
    said = []
    for data in dict.fromkeys(name.partition(" ")[0] for name in runs):
        shown = [f"{_accuracy(runs[f'{data} {arm}'])} ({arm})" for arm in SHOWN if f"{data} {arm}" in runs]
        said += [f"{data}: {', '.join(shown)}"] if shown else []
    if not said:
        return "Not measured yet: `python -m bench run concept_bottleneck`."
    return f"**Accuracy.** {'; '.join(said)}."


SHOWN = ("probe", "zero-shot", "cms", "dense", "l1", "contrastive", "gumbel")
"""Arms that the conclusion names."""
