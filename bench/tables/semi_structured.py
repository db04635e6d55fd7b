"""Tables of 2:4 weights."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from bench.tables.format import judged, signed, spread, tally

PICKS: tuple[Callable[[list[float]], float], ...] = (max, lambda curve: curve[-1])


def variants(results: dict[str, Any]) -> list[str]:
    """As `quality`, of runs from random weights keyed 'variant seed'."""
    runs, settings = results["results"], results["settings"]
    size = (
        f"{settings['batch_size']} × {settings['seq_len']} tokens"
        if "seq_len" in settings
        else f"{settings['batch_size']} images"
    )
    lines = [
        f"{settings['model']} on {settings['data']}, {settings['steps']} steps of {size}, lr {settings['lr']}.",
        "",
        "| variant | seeds | loss | loss - dense | accuracy | accuracy - dense | flip rate, largest, last |",
        "|" + " --- |" * 7,
    ]
    for name in dict.fromkeys(key.rpartition(" ")[0] for key in runs):
        own = {key.rpartition(" ")[2]: run for key, run in runs.items() if key.rpartition(" ")[0] == name}
        pairs = [(run, runs[f"dense {seed}"]) for seed, run in own.items() if f"dense {seed}" in runs]
        cells = []
        for key in ("loss", "accuracy"):
            known = bool(pairs) and pairs[0][0][key] is not None
            cells.append(spread([run[key] for run, _ in pairs]) if known else "–")
            differs = known and name != "dense"
            cells.append(spread([run[key] - dense[key] for run, dense in pairs]) if differs else "–")
        curves = [[rate for _, rate in run["flips"]] for run, _ in pairs if run["flips"]]
        flips = [f"{statistics.mean(pick(curve) for curve in curves):.3f}" for pick in PICKS] if curves else ["–"]
        lines.append(f"| {name} | {len(pairs)} | {' | '.join(cells)} | {', '.join(flips)} |")
    return lines


def emulation(results: dict[str, Any]) -> list[str]:
    lines = ["| FFN | tokens | preset | step, ours / dense | quartiles | aim 1.3 |", "|" + " --- |" * 6]
    for row in results["results"]:
        shape = row["shape"]
        lines.append(
            f"| {shape['d']} × {shape['f']} | {shape['tokens']:,} | {row['preset']} | {row['cost_median']:.2f} "
            f"| {row['cost_q1']:.2f}–{row['cost_q3']:.2f} | {'met' if row['aim_met'] else 'missed'} |"
        )
    return lines


def conclude_semi_structured(found: dict[str, Any]) -> str:
    rows = found["sparse24"]["results"]
    costs = [row["cost_median"] for row in rows]
    return (
        f"**Time on a CPU: {tally(row['verdict'] for row in rows)}**: sparse products are emulated, and a step costs "
        f"{min(costs):.2f} to {max(costs):.2f} times the dense one. No figure from a GPU yet. **Quality at equal "
        f"steps: {quality_semi_structured(found)}.** Runs this short do not tell a dense FFN from half of one."
    )


def quality_semi_structured(found: dict[str, Any]) -> str:
    """FST's loss less dense's on both tasks."""
    said = []
    for task, name in (("gpt", "text"), ("vit", "images")):
        runs = found[f"semi_structured_quality_{task}"]["results"]
        lost = [runs[f"fst {seed}"]["loss"] - runs[f"dense {seed}"]["loss"] for seed in (0, 1, 2)]
        said.append(f"{signed(lost)} on {name} ({judged(lost, less_is_better=True)})")
    return f"FST's loss less dense's {' and '.join(said)}"
