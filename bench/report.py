"""Write docs/support.md, and the tables of docs/results.md from the result files: `python bench/report.py`."""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
PAGE = ROOT.parent / "docs" / "results.md"
SUPPORT = ROOT.parent / "docs" / "support.md"


def attention(results: dict[str, Any]) -> list[str]:
    lines = ["| case | dense / ours | quartiles | choosing blocks, ms | verdict |", "| --- | --- | --- | --- | --- |"]
    for row in results["results"]:
        lines.append(
            f"| {row['case_id']} | {row['median']:.2f} | {row['q1']:.2f}–{row['q3']:.2f} | {row['selection_ms']:.0f} "
            f"| {row['verdict']} |"
        )
    return lines


def patterns(results: dict[str, Any]) -> list[str]:
    lines = ["| case | blocks kept | dense / ours | quartiles | searching the pattern, ms | verdict |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for row in results["results"]:
        lines.append(
            f"| {row['case_id']} | {row['keep_ratio_executed']:.1%} | {row['median']:.2f} "
            f"| {row['q1']:.2f}–{row['q3']:.2f} | {row['selection_ms']:.0f} | {row['verdict']} |"
        )
    return lines


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


def steps(results: dict[str, Any]) -> list[str]:
    """One row a candidate of `sparsetrain bench`."""
    recipe = results["recipe"]
    lines = [
        f"{recipe['model']}, {results['layers']} of {results['model_layers']} layers, "
        f"{recipe['batch_size']} × {recipe['seq_len']:,} tokens, LoRA r={recipe['lora_r']}.",
        *results["notes"],
        "",
        "| candidate | step, dense / ours | quartiles | part, dense / ours | saved bytes, ours / dense | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["outcomes"]:
        if row["step"] is None:
            lines.append(f"| {row['name']} | – | – | – | – | refused: {row['reason']} |")
            continue
        step = row["step"]
        lines.append(
            f"| {row['name']} | {step['median']:.2f} | {step['q1']:.2f}–{step['q3']:.2f} | {row['part']['median']:.2f} "
            f"| {row['saved_bytes'] / row['dense_saved_bytes']:.2f} | {row['verdict']} |"
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
        quality = f"{row['times_dense']:.3f}" if "times_dense" in row else "–"
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


def tokens(results: dict[str, Any]) -> list[str]:
    lines = ["| part | r | tokens | dense / ours | quartiles | target | verdict |", "|" + " --- |" * 7]
    for row in results["results"]:
        if row["part"] != "memory":
            lines.append(
                f"| {row['part']} | {row['ratio']} | {row['tokens']:,} | {row['median']:.2f} "
                f"| {row['q1']:.2f}–{row['q3']:.2f} | {row['target']:.2f} | {row['verdict']} |"
            )
    lines += ["", "| step, in a process of its own | r | tokens | saved, MiB | in blocks, MiB | peak resident, MiB |"]
    lines.append("|" + " --- |" * 6)
    for row in results["results"]:
        if row["part"] == "memory":
            name = row["case_id"].removeprefix("C1 memory ")
            saved, blocks, peak = (row[f"{key}_bytes"] / 2**20 for key in ("saved", "block", "peak"))
            ratio = 0.3 if name.startswith("tokens") else 1
            lines.append(f"| {name} | {ratio} | {row['tokens']:,} | {saved:,.0f} | {blocks:,.0f} | {peak:,.0f} |")
    return lines


def quality(results: dict[str, Any]) -> list[str]:
    """Mean ± standard error over seeds, and of the paired differences to dense; runs are keyed 'policy r seed'."""
    runs = results["results"]
    names = list(dict.fromkeys(key.rpartition(" ")[0] for key in runs))
    seeds = sorted({key.rpartition(" ")[2] for key in runs if f"dense 1 {key.rpartition(' ')[2]}" in runs})
    settings = results["settings"]
    lines = [
        f"{settings['model']} on {settings['data']}, {settings['steps']} steps of {settings['batch_size']} × "
        f"{settings['seq_len']} tokens, lr {settings['lr']}, LoRA r=16.",
        "",
        "| policy | r | seeds | loss | loss - dense | accuracy | accuracy - dense | saved bytes / dense |",
        "|" + " --- |" * 8,
    ]
    for name in sorted(names, key=lambda name: (name != "dense 1", name.rpartition(" ")[2])):
        pairs = [(runs[f"{name} {s}"], runs[f"dense 1 {s}"]) for s in seeds if f"{name} {s}" in runs]
        cells = []
        for key in ("loss", "accuracy"):
            known = bool(pairs) and pairs[0][0][key] is not None
            cells.append(spread([own[key] for own, _ in pairs]) if known else "–")
            cells.append(spread([own[key] - dense[key] for own, dense in pairs]) if known else "–")
        saved = statistics.mean(own["saved_bytes"] / dense["saved_bytes"] for own, dense in pairs)
        policy, _, ratio = name.rpartition(" ")
        lines.append(f"| {policy} | {ratio} | {len(pairs)} | {' | '.join(cells)} | {saved:.2f} |")
    return lines


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


PICKS: tuple[Callable[[list[float]], float], ...] = (max, lambda curve: curve[-1])


def emulation(results: dict[str, Any]) -> list[str]:
    lines = ["| FFN | tokens | preset | step, ours / dense | quartiles | aim 1.3 |", "|" + " --- |" * 6]
    for row in results["results"]:
        shape = row["shape"]
        lines.append(
            f"| {shape['d']} × {shape['f']} | {shape['tokens']:,} | {row['preset']} | {row['cost_median']:.2f} "
            f"| {row['cost_q1']:.2f}–{row['cost_q3']:.2f} | {'met' if row['aim_met'] else 'missed'} |"
        )
    return lines


def spread(values: list[float]) -> str:
    """Mean ± standard error."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{error}"


def bias(results: dict[str, Any]) -> list[str]:
    lines = ["| policy | r | draws | cosine of one draw | of the mean of all | length of the mean |"]
    lines.append("|" + " --- |" * 6)
    for row in results["results"]:
        sd = "" if row["cosine_sd"] is None else f" (sd {row['cosine_sd']:.3f})"
        lines.append(
            f"| {row['policy']} | {row['ratio']} | {row['draws']} | {row['cosine']:.3f}{sd} "
            f"| {row['cosine_of_mean']:.3f} | {row['length_of_mean']:.2f} |"
        )
    return lines


def pattern_accuracy(results: dict[str, Any]) -> list[str]:
    """Mean ± standard error over seeds, and of the paired differences to dense; runs are keyed 'variant seed'."""
    runs, settings = results["results"], results["settings"]
    seeds = sorted({key.split()[1] for key in runs if f"dense {key.split()[1]}" in runs})
    dense_ratio = settings["max_dense_ratio"]
    lines = [
        f"{settings['model']}, {settings['seq_len']} tokens, blocks of {settings['block_tokens']}, keep_ratio "
        f"{settings['keep_ratio']}, {settings['steps']} steps of {settings['batch_size']} rows, the first "
        f"{dense_ratio:.0%} dense, {settings['eval_tokens'] // settings['seq_len']:,} rows held out.",
        "",
        "| pattern | blocks kept | seeds | accuracy | accuracy - dense | loss - dense | search, share of steps |",
        "|" + " --- |" * 7,
    ]
    for name in dict.fromkeys(key.split()[0] for key in runs):
        pairs = [(runs[f"{name} {seed}"], runs[f"dense {seed}"]) for seed in seeds if f"{name} {seed}" in runs]
        if not pairs:
            continue
        own = [pair[0] for pair in pairs]
        cells = [name, "–", str(len(pairs)), spread([run["accuracy"] for run in own]), "–", "–", "–"]
        if name != "dense":
            cells[1] = f"{statistics.mean(run['density'] for run in own):.1%}"
            cells[4], cells[5] = (spread([a[key] - b[key] for a, b in pairs]) for key in ("accuracy", "loss"))
            cells[6] = f"{max(run['search_share'] for run in own):.1%}" if "search_share" in own[0] else "–"
        lines.append(f"| {' | '.join(cells)} |")
    return lines


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


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "selected_attention": attention,
    "flood_fill": patterns,
    "routed_ffn": ffn,
    "routed_ffn_frontier": frontier,
    "token_selection": tokens,
    "token_selection_quality_sft": quality,
    "token_selection_quality_classify": quality,
    "token_selection_bias": bias,
    "sparse24": emulation,
    "flood_fill_accuracy_pixels": pattern_accuracy,
    "flood_fill_accuracy_listops": pattern_accuracy,
    "semi_structured_quality_gpt": variants,
    "semi_structured_quality_vit": variants,
    "planner_accuracy": accuracy,
    "planner_accuracy_gpu": accuracy_gpu,
    "steps": steps,
    "planner_steps": step_times,
}


def main() -> None:
    page = PAGE.read_text()
    for name, table in TABLES.items():
        file = ROOT / "results" / f"{name}.json"
        if not file.exists():
            print(f"{file.name} is not there; its table is left as it is")
            continue
        results = json.loads(file.read_text())
        machine = results.get("machine", {})
        origin = f"{machine.get('cpu', 'CPU')}, commit {machine.get('commit', 'not recorded')}."
        body = "\n".join([*table(results), "", origin])
        marked = f"<!-- {name} -->\n{body}\n<!-- /{name} -->"
        page, count = re.subn(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, m=marked: m, page, flags=re.S)
        assert count == 1, f"docs/results.md has no place for {name}"
    PAGE.write_text(page)
    SUPPORT.write_text(support())


def support() -> str:
    """docs/support.md: what each method works with, from the data that runs are checked against."""
    import sparsetrain.methods  # noqa: F401  (enters them in the registry)
    from sparsetrain.hf.model.families import family_limits
    from sparsetrain.surgery.support import FEATURES, support_rows

    families = family_limits()
    rows = support_rows(families)
    lines = [
        "# What works with what",
        "",
        "Written by `make docs` from the data that every run is checked against (`Method.limits`, the table of",
        "families, `surgery/support.py`). A yes is exercised by `tests/methods/test_contract.py`; a no is refused",
        "before a run.",
        "",
        f"Families: {', '.join(families)}.",
        "",
        "| feature | " + " | ".join(row["method"] for row in rows) + " |",
        "| --- |" + " --- |" * len(rows),
    ]
    for feature, meaning in FEATURES.items():
        lines.append(f"| {meaning} | " + " | ".join(row["features"][feature] for row in rows) + " |")
    reasons = {f"{feature}: {reason}." for row in rows for feature, reason in row["reasons"].items()}
    reasons |= {
        f"{name}, {feature}: {reason}." for name, found in families.items() for feature, reason in found.items()
    }
    for row in rows:
        reasons |= {f"{row['method']} on {name}: {reason}." for name, reason in row["refused_families"].items()}
    return "\n".join([*lines, "", "## Why not", "", *(f"- {reason}" for reason in sorted(reasons))]) + "\n"


if __name__ == "__main__":
    main()
