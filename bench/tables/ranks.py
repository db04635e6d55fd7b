"""Tables of data-parallel ranks on one machine."""

from __future__ import annotations

from typing import Any

from bench.tables.linears import DASH, head, line


def parallel_ranks(results: dict[str, Any]) -> list[str]:
    """Tokens/s of ranks beside one process with as many threads, in turns; and what our callbacks take of a step."""
    settings, cells = results["settings"], results["results"]
    count = settings["ranks"]
    lines = [
        f"{settings['batch_size'] * settings['grad_accum']} rows of {settings['seq_len']} tokens a step, LoRA, "
        f"{settings['steps']} steps, {results['dtype']}.",
        "",
    ]
    lines += head(
        "recipe", f"{count} ranks of one thread, tokens/s", f"one process of {count}", "ratio, each turn", "median",
        "last losses differ by", "time in our callbacks",
    )  # fmt: skip
    for key, cell in cells.items():
        name, _, what = key.rpartition(" ")
        if what != "ddp":
            continue
        each = [[f"{turn[who]['tokens_per_s']:.0f}" for turn in cell["turns"]] for who in ("ranks", "alone")]
        share = cells.get(f"{name} hooks")
        told = DASH if share is None else f"{share['share']:.1%}"
        ratios = ", ".join(f"{ratio:.2f}" for ratio in cell["ratios"])
        median, gap = f"{cell['tokens_per_s_ratio']:.2f}", f"{cell['loss_gap']:.0e}"
        lines.append(line(name, ", ".join(each[0]), ", ".join(each[1]), ratios, median, gap, told))
    return lines


def conclude_ranks(found: dict[str, Any]) -> str:
    cells = found["parallel_ranks"]["results"] if "parallel_ranks" in found else {}
    said = [f"{cell['tokens_per_s_ratio']:.2f}× ({key[:-4]})" for key, cell in cells.items() if key.endswith(" ddp")]
    if not said:
        return "Not measured yet: `python -m bench run parallel_ranks`."
    shares = [cell["share"] for key, cell in cells.items() if key.endswith(" hooks")]
    hooks = f" Our callbacks take {max(shares):.1%} of a step." if shares else ""
    count = found["parallel_ranks"]["settings"]["ranks"]
    return f"**Tokens/s of {count} ranks over one process of {count} threads**: {', '.join(said)}.{hooks}"
