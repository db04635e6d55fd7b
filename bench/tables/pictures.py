"""Tables of SparseDM and of the concept bottleneck."""

from __future__ import annotations

import statistics
from typing import Any

from bench.methods.sara_diffusion import indices
from bench.runner import ROOT
from bench.tables.format import spread
from bench.tables.linears import DASH, beside, head, line, mean_of, seeds_of

SHEET = ROOT.parent / "docs" / "pictures" / "sparsedm.png"
"""Samples of every arm of the first seed, as rows."""
COLUMNS = (
    ("loss, new", "loss_new"),
    ("loss, old", "loss_old"),
    ("FID, new", "fid_new"),
    ("FID, old", "fid_old"),
    ("KID, new", "kid_new"),
    ("KID, old", "kid_old"),
)


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
    if exported := results["results"].get("export"):
        lines += ["", _exported(exported)]
    if "pictures" in results["results"] and SHEET.exists():
        rows = ", ".join(results["results"]["pictures"]["rows"])
        lines += ["", f"![Samples of every arm, a row each](../pictures/{SHEET.name})", "", f"Rows: {rows}."]
    return lines


def _exported(cell: dict[str, Any]) -> str:
    """The model without masks, its zeros written in, and whether it could be packed for 2:4 products."""
    return (
        f"Exported (`teacher`, first seed): outputs differ by {cell['largest_difference']:.1g} at most; a forward "
        f"takes {cell['exported_of_dense']:.2f} of the dense model's time ({cell['masked_of_dense']:.2f} while masks "
        f"are chosen). 2:4 packing: {cell['packed']}"
    )


def sara_diffusion(results: dict[str, Any]) -> list[str]:
    """By size: what the new class costs on the old ones, every arm of as many numbers, and the combined index."""
    cells = results["results"]
    runs, index = seeds_of(cells), indices(cells)
    sizes = dict.fromkeys(name.rpartition(" ")[2] for name in runs if name not in ("pretrained", "full all"))
    lines: list[str] = []
    if before := runs.get("pretrained"):
        told = [f"{key.replace('_', ', ')}: {mean_of(before, key)}" for key in ("loss_old", "fid_old", "kid_old")]
        lines += [f"Before fine-tuning: {'; '.join(told)}.", ""]
    for size in sizes:
        lines += [f"**{size}**", ""]
        lines += head("arm", "seeds", "trained", *(text for text, _ in COLUMNS), "VLHI")
        for name in [
            *(name for name in runs if name.endswith(f" {size}")),
            *(["full all"] if "full all" in runs else []),
        ]:
            arm, own = name.rpartition(" ")[0], runs[name]
            found = index.get(size, {}).get(arm)
            trained = f"{next(iter(own.values()))['trained']:,}"
            values = [mean_of(own, key) for _, key in COLUMNS]
            lines.append(line(arm, len(own), trained, *values, spread(found) if found else DASH))
        lines.append("")
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


def best_concepts(found: dict[str, Any]) -> str:
    """By data: the most accurate of the three losses, beside the dense bottleneck and the linear probe."""
    runs = seeds_of(found["concept_bottleneck"]["results"]) if "concept_bottleneck" in found else {}
    said = []
    for data in dict.fromkeys(name.partition(" ")[0] for name in runs):
        own = {arm: runs[f"{data} {arm}"] for arm in SHOWN if f"{data} {arm}" in runs}
        sparse = [arm for arm in ("l1", "contrastive", "gumbel") if arm in own]
        if not sparse or not {"dense", "probe"} <= own.keys():
            continue
        best = max(sparse, key=lambda arm: statistics.mean(run["accuracy"] for run in own[arm].values()))
        said.append(
            f"{data}: {_accuracy(own[best])} ({best}), dense bottleneck {_accuracy(own['dense'])}, linear probe "
            f"{_accuracy(own['probe'])}"
        )
    return f"accuracy on {'; on '.join(said)}" if said else "not measured"


SHOWN = ("probe", "zero-shot", "cms", "dense", "l1", "contrastive", "gumbel")
"""Arms that the conclusion names."""
