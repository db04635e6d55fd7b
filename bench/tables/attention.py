"""Tables of the methods that make attention sparse."""

from __future__ import annotations

import statistics
from typing import Any

from bench.tables.format import judged, judged_share, listed, signed, spread, tally


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


def conclude_pq_attention(found: dict[str, Any]) -> str:
    rows = found["selected_attention"]["results"]
    coarse = [row for row in rows if row["case_id"].endswith("128x64")]
    ratios = listed([f"{row['median']:.1f}×" for row in coarse])
    tokens = listed([f"{int(row['case_id'][1:].split('_')[0]):,}" for row in coarse])
    return (
        f"**Time: {tally(row['verdict'] for row in rows)}** of attention with the choice of keys included, against "
        f"SDPA; {ratios} at {tokens} tokens with 512 keys a query in blocks of 128 × 64. "
        f"{_whole_step(found, 'pq_attention')} Fused dense attention keeps no map either, so memory has nothing to win."
    )


def conclude_flood_fill_attention(found: dict[str, Any]) -> str:
    rows = found["flood_fill"]["results"]
    at = {row["case_id"]: row["median"] for row in rows}
    return (
        f"**Time: {tally(row['verdict'] for row in rows)}**: attention with 5 % of the blocks "
        f"{at['A3/t2048_full_cf_0.05']:.1f}× faster than SDPA at 2,048 and {at['A3/t4096_full_cf_0.05']:.1f}× at 4,096 "
        f"tokens. {_whole_step(found, 'flood_fill_attention')} **Accuracy of short runs, from the same weights and "
        f"rows, less dense's: {quality_flood_fill_attention(found)}.**"
    )


def quality_flood_fill_attention(found: dict[str, Any]) -> str:
    """CF's accuracy less dense's on both tasks."""
    said = []
    for task, name in (("pixels", "images as pixels"), ("listops", "ListOps")):
        runs = found[f"flood_fill_accuracy_{task}"]["results"]
        seeds = [key.split()[1] for key in runs if key.startswith("cf ")]
        lost = [runs[f"cf {seed}"]["accuracy"] - runs[f"dense {seed}"]["accuracy"] for seed in seeds]
        said.append(f"{signed(lost)} on {name} ({judged(lost, less_is_better=False)})")
    return f"{' and '.join(said)}, at a tenth of the blocks"


def _whole_step(found: dict[str, Any], name: str) -> str:
    steps = found["steps"]
    row = next(row for row in steps["outcomes"] if row["name"] == name)
    share = row["saved_bytes"] / row["dense_saved_bytes"]
    return (
        f"A whole LoRA step of SmolLM2 at {steps['recipe']['seq_len']:,} tokens: {row['step']['median']:.2f}× "
        f"(a {row['step']['verdict']}), saved bytes {share:.2f} of dense LoRA's ({judged_share(share)})."
    )
