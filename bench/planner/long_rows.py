"""Very long rows on a CPU: what token selection holds at its peak beside what `plan` says, and its gradients.

A small Llama with random weights, 2 % of the tokens selected: two passes, and blocks that run their selected rows again
(`recompute`). Each side is measured in a process of its own, as in `planner_accuracy`; the second side's gradients are
compared with the first's.
"""

from __future__ import annotations

from typing import Any

from bench.planner.accuracy import compare
from bench.runner import Asked, Benchmark, Cell, in_own_process

TOKENS = {"method": "token_selection", "keep_ratio": 0.02}
WAYS: dict[str, dict[str, Any]] = {"two passes": TOKENS, "recompute": {**TOKENS, "recompute": True}}


def _recipe(way: str, tokens: int) -> Any:
    from sparsetrain.recipes.finetune import Recipe

    return Recipe.from_values({"model": "smollm2-135m", "data": "none", "seq_len": tokens, "methods": [WAYS[way]]})


def _config(tokens: int) -> Any:
    from transformers import LlamaConfig

    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 1, "num_hidden_layers": 4}
    sizes = {"hidden_size": 128, "intermediate_size": 1024, "vocab_size": 512}
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=tokens, use_cache=False, pad_token_id=None)
    config.bos_token_id = config.eos_token_id = None
    return config


def predict(way: str, tokens: int) -> dict[str, Any]:
    """As `plan` predicts it: fitted to three short lengths."""
    from sparsetrain.hf.study.recipe_trace import outline

    found = outline(_recipe(way, tokens), _config(tokens), bf16=False)
    peak = found.peak(tokens)
    return {"saved": peak.saved_in_full, "peak": peak.total, "phase": peak.phase, "how": found.how(tokens)}


def measure(way: str, tokens: int) -> dict[str, Any]:
    """The peaks of a step, what it saves, and a digest of the gradients."""
    import torch
    from transformers import LlamaForCausalLM

    from sparsetrain import sparsify
    from sparsetrain.hf.model.models import add_lora
    from sparsetrain.hf.study.recipe_trace import example_batch, training_step
    from sparsetrain.measure.memory import peak_memory, reset_peak, saved_activations, static_memory
    from sparsetrain.planner.step_tracer import trace_step

    recipe, config = _recipe(way, tokens), _config(tokens)
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    network = add_lora(base, recipe, sparsify(base, *recipe.configs), []).train()
    trained = [p for p in network.parameters() if p.requires_grad]
    for parameter in trained:
        if not parameter.any():  # or no gradient reaches the other factor
            torch.nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    optimizer.zero_grad(set_to_none=True)
    step = training_step(network, example_batch(recipe, config, tokens, rows=1), False)
    step().backward()
    gradient = torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
    optimizer.step()
    static = static_memory(network, optimizer)
    fixed = static.total - static.gradients
    optimizer.zero_grad(set_to_none=True)
    saved = saved_activations(network, lambda: step())
    before = peak_memory().rss_bytes or 0
    reset_peak()
    step().backward()
    above = (peak_memory().rss_peak_bytes or 0) - before
    optimizer.zero_grad(set_to_none=True)
    trace, live, most = trace_step(network, step, None), 0.0, 0.0
    for segment in (trace.before, *trace.forward, trace.head, *reversed(trace.backward)):
        most, live = max(most, live + segment.peak), live + segment.kept
    return {
        "saved": saved.by_component,
        "peak": fixed + most,
        "peak_resident": fixed + above,
        "gradient": [float(x) for x in gradient[:: max(1, len(gradient) // 4096)]],
    }


def cell(way: str, tokens: int, other: dict[str, Any] | None = None) -> dict[str, Any]:
    predicted = predict(way, tokens)
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    measured = in_own_process("bench.planner.long_rows:measure", way, tokens, environment=environment)
    errors = compare(predicted, measured)
    found = {"predicted": predicted, "measured": measured, "errors": errors}
    found["worst_error"] = max(errors.values(), key=abs)
    if other is not None:
        mine, theirs = measured["gradient"], other["measured"]["gradient"]
        apart = sum((a - b) ** 2 for a, b in zip(mine, theirs, strict=True)) ** 0.5
        found["gradient_error"] = apart / sum(b * b for b in theirs) ** 0.5
        found["peak_share"] = measured["peak"] / other["measured"]["peak"]
    return found


def cells(asked: Asked) -> list[Cell]:
    tokens = asked.settings["tokens"]
    first = Cell(f"two passes / {tokens}", lambda: cell("two passes", tokens))
    again = Cell(f"recompute / {tokens}", lambda other: cell("recompute", tokens, other), uses=(first.key,))
    return [first, again]


BENCHMARKS = [
    Benchmark(
        name="planner_long_rows",
        measures="rows of 16,384 tokens on a CPU, 2 % of them selected: peak memory beside the plan's, gradients",
        cells=cells,
        settings={"tokens": 16384},
        quick={"tokens": 2048},
        under="cells",
        shows=("worst_error", "gradient_error", "peak_share"),
    )
]
