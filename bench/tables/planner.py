"""Tables of the planner's predictions."""

from __future__ import annotations

from typing import Any

from sparsetrain.parallel.published import RUNS


def accuracy(results: dict[str, Any]) -> list[str]:
    """Predicted against measured peak, and the worst relative error among peak and components."""
    lines = ["| model / recipe / tokens | predicted peak, MB | measured peak, MB | worst error | static bytes |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name, cell in results["cells"].items():
        lines.append(
            f"| {name} | {cell['predicted']['peak'] / 1e6:,.0f} | {cell['measured']['peak'] / 1e6:,.0f} "
            f"| {max(map(abs, cell['errors'].values())):.1%} | {'exact' if cell['static_exact'] else 'off'} |"
        )
    return lines


def accuracy_gpu(results: dict[str, Any]) -> list[str]:
    """As `accuracy`, with seconds of a step; the GPU and its versions above."""
    machine, versions = results["machine"]["gpus"][0], results["machine"]["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "cuda"))
    lines = [f"{machine['name']}, {named}.", ""]
    lines.append(
        "| model / recipe / tokens | peak, GB: predicted | measured | worst error | step, s: roofline | measured |"
    )
    lines.append("|" + " --- |" * 6)
    for name, cell in results["cells"].items():
        predicted, measured = cell["predicted"], cell["measured"]
        if "peak" not in measured:
            lines.append(
                f"| {name} | {predicted['peak'] / 1e9:.2f} | out of memory | – | {predicted['step_s']:.3f} | – |"
            )
            continue
        lines.append(
            f"| {name} | {predicted['peak'] / 1e9:.2f} | {measured['peak'] / 1e9:.2f} "
            f"| {max(map(abs, cell['errors'].values())):.1%} | {predicted['step_s']:.3f} | {measured['step_s']:.3f} |"
        )
    exact = [cell["static_exact"] for cell in results["cells"].values() if "static_exact" in cell]
    return [*lines, "", f"Parameters, gradients and optimizer state exact in {sum(exact)} of {len(exact)} cells."]


def step_times(results: dict[str, Any]) -> list[str]:
    """Predicted and measured seconds of a step; the ratio to dense is what a choice between recipes rests on."""
    lines = [f"{results['model']}, {results['tokens']:,} tokens, LoRA, all layers.", ""]
    lines += ["| recipe | roofline, s | measured, s | off by | dense / ours, roofline | dense / ours, measured |"]
    lines.append("|" + " --- |" * 6)
    dense = results["rows"]["LoRA"]
    for name, row in results["rows"].items():
        lines.append(
            f"| {name} | {row['roofline_s']:.2f} | {row['measured_s']:.2f} "
            f"| {row['roofline_s'] / row['measured_s'] - 1:+.0%} | {dense['roofline_s'] / row['roofline_s']:.2f} "
            f"| {dense['measured_s'] / row['measured_s']:.2f} |"
        )
    return lines


def grids(results: dict[str, Any]) -> list[str]:
    """Messages of each number of processes beside the line that is fitted to them, then steps beside the simulator."""
    settings, cells = results["settings"], results["rows"]
    lines = ["| processes | bytes | all-reduce, ms | fitted | all-gather, ms | by the fit |", "|" + " ---: |" * 6]
    for name, cell in cells.items():
        if not name.startswith("network"):
            continue
        world = int(name.rpartition(" ")[2])
        for size, seconds in cell["all_reduce_s"].items():
            share, hops = (world - 1) / world * int(size) / cell["bytes_per_s"], (world - 1) * cell["hop_s"]
            lines.append(
                f"| {world} | {int(size):,} | {1e3 * seconds:.2f} | {2e3 * (share + hops):.2f} "
                f"| {1e3 * cell['all_gather_s'][size]:.2f} | {1e3 * (share + hops):.2f} |"
            )
    lines += ["", f"Steps of {settings['blocks']} blocks of {settings['hidden']}, {settings['rows']:,} rows, fp32.", ""]
    lines += ["| grid | beside arithmetic, ms | simulated | off by | in turn, ms | simulated | off by |"]
    lines.append("| --- |" + " ---: |" * 6)
    for name, cell in cells.items():
        if name.startswith("network"):
            continue
        parts = [name]
        for measured, simulated in (("measured_s", "simulated_s"), ("in_turn_s", "simulated_in_turn_s")):
            here, there = cell[measured], cell[simulated]
            parts += [f"{1e3 * here:.1f}", f"{1e3 * there:.1f}", f"{there / here - 1:+.0%}"]
        lines.append(f"| {' | '.join(parts)} |")
    return lines


def published() -> list[str]:
    """Published runs beside what the simulator says of them; `tests/parallel/test_simulate.py` runs it again."""
    lines = ["| run | predicted, PFLOP/s | published | off by | waiting for messages | closes it alone | assumed |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | --- | --- |")
    for run in RUNS:
        found = run.found
        ratios = (("rates", found.rate_ratio), ("links", found.link_ratio))
        closes = " or ".join(f"{what} × {ratio:.2f}" for what, ratio in ratios if ratio is not None)
        lines.append(
            f"| {run.name} | {found.flops_per_s / 1e15:,.0f} | {run.flops_per_s / 1e15:,.0f} "
            f"| {found.flops_per_s / run.flops_per_s - 1:+.0%} | {found.exposed_ratio:.0%} of the step | {closes} "
            f"| {run.assumed} |"
        )
    return lines


def conclude_planner(found: dict[str, Any]) -> str:
    cpu, gpu = (found[name]["cells"] for name in ("planner_accuracy", "planner_accuracy_gpu"))
    exact = sum(cell["static_exact"] for cell in (*cpu.values(), *gpu.values()))
    peaks = [max(abs(cell["errors"]["peak"]) for cell in cells.values()) for cells in (cpu, gpu)]
    rows = found["planner_steps"]["rows"].values()
    off = [row["roofline_s"] / row["measured_s"] - 1 for row in rows]
    return (
        f"**Memory holds**: parameters, gradients and optimizer state are exact in {exact} of {len(cpu) + len(gpu)} "
        f"cells, and peaks within {peaks[0]:.1%} on a CPU and {peaks[1]:.1%} on an H200. **Time is optimistic**: on a "
        f"CPU steps are predicted {-max(off):.0%} to {-min(off):.0%} too short."
    )
