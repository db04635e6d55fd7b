"""Tables of the routed FFN."""

from __future__ import annotations

import itertools
from typing import Any

from bench.tables.format import tally


def ffn(results: dict[str, Any]) -> list[str]:
    lines = ["| shape | tokens | blocks, active | β | dense / ours | share of 1/β | verdict |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for row in results["results"]:
        shape = row["shape"]
        lines.append(
            f"| {shape['name']}: d {shape['d']}, f {shape['f']}, {shape['shared']} always on | {shape['tokens']:,} "
            f"| {shape['blocks']}, {shape['active']} | {row['keep_ratio_executed']:.2f} | {row['ratio_median']:.2f} "
            f"| {row['efficiency']:.2f} | {row['verdict']} |"
        )
    return lines


def frontier(results: dict[str, Any]) -> list[str]:
    """One row a configuration of `bench/methods/routed_ffn/frontier.py`; a dash where it was not measured."""
    lengths = sorted({int(tokens) for row in results["rows"].values() for tokens in row.get("speedup", {})})
    heads = [f"FFN, dense / ours, {tokens:,} tokens" for tokens in lengths]
    lines = [
        "| configuration | always on | blocks, active | β | layers | × dense perplexity | " + " | ".join(heads) + " |"
    ]
    lines.append("|" + " --- |" * (6 + len(lengths)))
    for name, row in results["rows"].items():
        if name == "dense":
            continue
        config, speed = row["config"], row.get("speedup", {})
        quality = f"{row['quality']['times_dense']:.3f}" if "quality" in row else "–"
        speeds = [f"{speed[str(t)]['median']:.2f}" if str(t) in speed else "–" for t in lengths]
        lines.append(
            f"| {name} | {config['shared_ratio']:.0%} | {config['num_blocks']}, {config['num_active']} "
            f"| {config['active_ratio']:.2f} | {len(config['layers'])} | {quality} | " + " | ".join(speeds) + " |"
        )
    trained = {name: row["trained"] for name, row in results["rows"].items() if "trained" in row}
    return [*lines, "", *frontier_trained(trained)] if "dense" in trained else lines


def frontier_trained(runs: dict[str, Any]) -> list[str]:
    """Beside dense LoRA at equal steps, and when it has had the same time, set-up included."""
    dense = runs["dense"]["evals"]
    lines = [
        "| configuration | dense | after conversion | after distillation | after 200 steps | × dense LoRA, equal steps "
        "| × dense LoRA, equal time | set-up, s | seconds a step |",
        "|" + " --- |" * 9,
    ]
    for name, run in runs.items():
        stages, last = run["stages"], run["evals"][-1]
        shown = [stages.get(f"after_{stage}") for stage in ("conversion", "distillation", "training")]
        cells = [f"{stages['dense']:.3f}", *("–" if value is None else f"{value:.3f}" for value in shown)]
        for other in (perplexity_at(dense, "step", last["step"]), perplexity_at(dense, "wall_s", spent(run))):
            cells.append(f"{last['perplexity'] / other:.3f}")
        cells += [f"{run['setup_s']:.0f}", f"{last['wall_s'] / last['step']:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def spent(run: dict[str, Any]) -> float:
    return run["setup_s"] + run["evals"][-1]["wall_s"]


def perplexity_at(evals: list[dict[str, Any]], axis: str, place: float) -> float:
    """Between the two nearest evaluations along a line; after the last, that of the last."""
    for before, after in itertools.pairwise(evals):
        if before[axis] <= place < after[axis]:
            share = (place - before[axis]) / (after[axis] - before[axis])
            return before["perplexity"] + share * (after["perplexity"] - before["perplexity"])
    return evals[-1]["perplexity"]


def conclude_routed_ffn(found: dict[str, Any]) -> str:
    rows = found["routed_ffn"]["results"]
    demo = found["routed_ffn_frontier"]["rows"]["demo"]
    speeds = {tokens: at["median"] for tokens, at in demo["speedup"].items()}
    return (
        f"**Time: {tally(row['verdict'] for row in rows)}** against the dense FFN with the same LoRA; blocks of few "
        f"units lose. As converted in SmolLM2 (the demo's β = {demo['config']['active_ratio']:.2f}), an FFN runs "
        f"{speeds['1024']:.2f}× as fast at 1,024 and {speeds['2048']:.2f}× at 2,048 tokens. "
        f"**Quality: a loss**: {quality_routed_ffn(found)}."
    )


def quality_routed_ffn(found: dict[str, Any]) -> str:
    """Perplexity beside dense LoRA after the same steps."""
    rows = found["routed_ffn_frontier"]["rows"]
    dense = rows["dense"]["trained"]["evals"]
    said = []
    for name in ("light", "demo"):
        last = rows[name]["trained"]["evals"][-1]
        ratio = last["perplexity"] / perplexity_at(dense, "step", last["step"])
        said.append(f"× {ratio:.3f} with {len(rows[name]['config']['layers'])} layers converted")
    return f"perplexity beside dense LoRA after 200 steps {' and '.join(said)}"
