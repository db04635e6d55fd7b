"""The table of whole training steps, and what the README says of every registered method."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.tables.attention import quality_flood_fill_attention
from bench.tables.deploy import quality_deployed
from bench.tables.ffn import quality_routed_ffn
from bench.tables.format import tally
from bench.tables.growth import conclude_masked_growth, conclude_multi_level
from bench.tables.linears import conclude_monarch, conclude_pst, conclude_sara, step_sara
from bench.tables.pictures import best_concepts, conclude_sparsedm
from bench.tables.semi_structured import quality_semi_structured

ROOT = Path(__file__).parents[2]
NOT_MEASURED = "not measured at equal steps"


def in_a_cell(conclude: Callable[[dict[str, Any]], str]) -> Callable[[dict[str, Any]], str]:
    """What a page concludes, as the README's table can hold it."""

    def cell(found: dict[str, Any]) -> str:
        said = conclude(found)
        return NOT_MEASURED if said.startswith("Not measured") else said.replace("**", "").rstrip(".")

    return cell


QUALITY: dict[str, Callable[[dict[str, Any]], str]] = {
    "concept_bottleneck": best_concepts,
    "flood_fill_attention": quality_flood_fill_attention,
    "masked_growth": in_a_cell(conclude_masked_growth),
    "monarch": in_a_cell(conclude_monarch),
    "monarch_then_dense": in_a_cell(conclude_monarch),
    "multi_level": in_a_cell(conclude_multi_level),
    "pst": in_a_cell(conclude_pst),
    "routed_ffn": quality_routed_ffn,
    "sara": in_a_cell(conclude_sara),
    "semi_structured": quality_semi_structured,
    "sparsedm": in_a_cell(conclude_sparsedm),
}
"""Where the grid of deployed models has no setting of a method alone."""
PAGES = {"masked_growth": "growth", "monarch_then_dense": "monarch", "multi_level": "growth"}
"""Results of a method whose page is not named after it."""


@dataclass(frozen=True)
class Described:
    """A registered method as its own page describes it: the first sentence, and the papers of the first paragraph."""

    config: str
    page: str
    text: str
    papers: tuple[str, ...]

    @classmethod
    def of(cls, name: str, config: type) -> Described:
        page = f"src/{config.__module__.rpartition('.')[0].replace('.', '/')}/README.md"
        paragraphs = [part for part in (ROOT / page).read_text().split("\n\n") if not part.startswith("#")]
        first = " ".join(paragraphs[0].split())
        sentence = re.split(r"(?<=\.)\s", first)[0].rstrip(".")
        return cls(config.__name__, page, sentence, tuple(re.findall(r"\b\d{4}\.\d{5}\b", first)))


def registered() -> dict[str, Described]:
    import sparsetrain.methods  # noqa: F401  (enters them in the registry)
    from sparsetrain.core.config import registered_methods

    ours = {name: kind for name, kind in registered_methods().items() if kind.__module__.startswith("sparsetrain.")}
    return {name: Described.of(name, config) for name, config in sorted(ours.items())}


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


def conclude_steps(found: dict[str, Any]) -> str:
    rows = [row for row in found["steps"]["outcomes"] if row["step"] is not None]
    best = max(rows, key=lambda row: row["step"]["median"])
    worst = min(rows, key=lambda row: row["step"]["median"])
    refused = [row["name"] for row in found["steps"]["outcomes"] if row["step"] is None]
    return (
        f"**Time: {tally(row['verdict'] for row in rows)}** beside dense LoRA: from {best['step']['median']:.2f}× "
        f"({best['name']}) to {worst['step']['median']:.2f}× ({worst['name']}). Refused: "
        f"{', '.join(refused) or 'none'}. What the gain costs in quality is on each method's page."
    )


def methods(found: dict[str, Any], described: dict[str, Described]) -> list[str]:
    """A row a registered method: what it does, its whole step, its quality, its page."""
    outcomes = {row["name"]: row for row in found["steps"]["outcomes"]}
    seq_len = found["steps"]["recipe"]["seq_len"]
    lines = [
        f"| method | what it does | step of {seq_len:,} tokens, dense / ours | saved bytes, ours / dense "
        "| quality at equal steps, against dense | |",
        "|" + " --- |" * 6,
    ]
    for name, method in described.items():
        row = outcomes.get(name)
        time, saved = (step_sara(found) if name == "sara" else None) or "not measured", "–"
        if row is not None and row["step"] is None:
            time = "refused beside LoRA, with its defaults"
        elif row is not None:
            time = f"{row['step']['median']:.2f}, {row['verdict']}"
            saved = f"{row['saved_bytes'] / row['dense_saved_bytes']:.2f}"
        quality = quality_deployed(found, name) or (QUALITY[name](found) if name in QUALITY else NOT_MEASURED)
        papers = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in method.papers)
        results = f"docs/results/{PAGES.get(name, name)}.md"
        measured = f"[results]({results})" if (ROOT / results).exists() else "–"
        cells = [f"[`{method.config}`]({method.page})", f"{method.text} ({papers})", time, saved, quality, measured]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
