"""The docs' tables: one function a result file, and one a page for its conclusion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.tables import (
    attention,
    deploy,
    ffn,
    growth,
    linears,
    pictures,
    planner,
    ranks,
    semi_structured,
    steps,
    tokens,
)

TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "selected_attention": attention.attention,
    "flood_fill": attention.patterns,
    "flood_fill_accuracy_pixels": attention.pattern_accuracy,
    "flood_fill_accuracy_listops": attention.pattern_accuracy,
    "routed_ffn": ffn.ffn,
    "routed_ffn_frontier": ffn.frontier,
    "token_selection": tokens.tokens,
    "token_selection_quality_sft": tokens.quality,
    "token_selection_quality_classify": tokens.quality,
    "token_selection_bias": tokens.bias,
    "sparse24": semi_structured.emulation,
    "semi_structured_quality_gpt": semi_structured.variants,
    "semi_structured_quality_vit": semi_structured.variants,
    "planner_accuracy": planner.accuracy,
    "planner_accuracy_gpu": planner.accuracy_gpu,
    "planner_steps": planner.step_times,
    "planner_grids": planner.grids,
    "parallel_ranks": ranks.parallel_ranks,
    "steps": steps.steps,
    "deploy": deploy.deploy,
    "sara": linears.sara,
    "super_tuning": linears.sara,
    "sara_diffusion": pictures.sara_diffusion,
    "pst": linears.pst,
    "monarch": linears.monarch_products,
    "monarch_quality": linears.monarch,
    "multi_level_gpt": growth.multi_level,
    "multi_level_bert": growth.multi_level,
    "multi_level_vit": growth.multi_level,
    "masked_growth": growth.masked_growth,
    "sparsedm": pictures.sparsedm,
    "concept_bottleneck": pictures.concepts,
}
"""Result file -> its table."""

WITHOUT_TABLE = {
    "attention": "given lists of keys; `selected_attention` adds the choice of them, and is shown",
    "blocks_gpu": "no GPU has run it yet",
    "gpu_long_rows": "no GPU has run it yet",
    "gpu_steps": "no GPU has run it yet",
    "sparse24_gpu": "no GPU has run it yet",
    "host_work": "counts of one run on a CPU, which are in the log",
    "planner_long_rows": "a check of the planner at one length, whose result is not kept",
}
"""Benchmark -> why no page has a table of it."""

CONCLUSIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "deploy": deploy.conclude_deploy,
    "steps": steps.conclude_steps,
    "pq_attention": attention.conclude_pq_attention,
    "flood_fill_attention": attention.conclude_flood_fill_attention,
    "token_selection": tokens.conclude_token_selection,
    "routed_ffn": ffn.conclude_routed_ffn,
    "semi_structured": semi_structured.conclude_semi_structured,
    "sara": linears.conclude_sara,
    "pst": linears.conclude_pst,
    "monarch": linears.conclude_monarch,
    "growth": growth.conclude_growth,
    "sparsedm": pictures.conclude_sparsedm,
    "concept_bottleneck": pictures.conclude_concepts,
    "planner": planner.conclude_planner,
    "ranks": ranks.conclude_ranks,
}
"""Page of docs/results -> what its numbers say, in the order of the index."""
