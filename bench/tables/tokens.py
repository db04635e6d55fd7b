"""Tables of token selection."""

from __future__ import annotations

import statistics
from typing import Any

from bench.tables.format import judged, judged_share, signed, spread, tally


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


def conclude_token_selection(found: dict[str, Any]) -> str:
    rows = {row["case_id"]: row for row in found["token_selection"]["results"]}
    at = {name: rows[f"C1 {name} r=0.3"]["median"] for name in ("step", "checkpointing")}
    memory = {name: rows[f"C1 memory {name}"] for name in ("lora", "tokens")}
    saved = memory["tokens"]["saved_bytes"] / memory["lora"]["saved_bytes"]
    peaks = [memory[name]["peak_bytes"] / 2**20 for name in ("tokens", "lora")]
    again = f"{at['checkpointing']:.2f}× with checkpointing on both sides"
    return (
        f"**Time: {tally(row['verdict'] for row in rows.values() if 'verdict' in row)}.** At r = 0.3 a whole step of "
        f"2,048 tokens is {at['step']:.2f}× as fast as dense LoRA's ({again}). **Memory: "
        f"{judged_share(saved)}**: at 1,024 tokens it saves {saved:.2f} of the activation bytes, and a "
        f"process peaks at {peaks[0]:,.0f} MiB instead of {peaks[1]:,.0f}. **Quality at equal steps**: "
        f"{quality_token_selection(found)}. On a GPU it saved memory and lost time ([log](../log.md))."
    )


def quality_token_selection(found: dict[str, Any]) -> str:
    """Loss of conversations and accuracy of reviews, less dense's."""
    runs = found["token_selection_quality_sft"]["results"]
    lost = [runs[f"targets 0.3 {s}"]["loss"] - runs[f"dense 1 {s}"]["loss"] for s in (0, 1, 2)]
    runs = found["token_selection_quality_classify"]["results"]
    less = [runs[f"random 0.3 {s}"]["accuracy"] - runs[f"dense 1 {s}"]["accuracy"] for s in (0, 1, 2)]
    return (
        f"loss {signed(lost)} nats on conversations ({judged(lost, less_is_better=True)}), accuracy {signed(less)} on "
        f"reviews ({judged(less, less_is_better=False)}), in short runs at r = 0.3"
    )
