"""Predicted against measured memory of a training step: models × ways to train × lengths.

Each cell is measured in a process of its own with the real weights and all layers: saved activations by component
(saved-tensor hooks), static bytes from the real objects, the peak of live tensor bytes, and the peak of resident
memory (Linux; above what is resident between steps). Nothing of the prediction enters the measurement.
"""

from __future__ import annotations

from typing import Any

from bench.runner import Asked, Benchmark, Cell, in_own_process

MODELS = {"smollm2-135m": "lm", "minilm": "classify"}
LENGTHS = (128, 256, 512)
_PQ = {"method": "pq_attention", "keep_ratio": 0.25, "block_q": 64, "block_k": 16, "from_depth": 0.7}
_FFN = {
    "method": "routed_ffn",
    "num_blocks": 8,
    "num_active": 2,
    "shared_ratio": 1 / 3,
    "partition": "clustered",
    "from_depth": 0.45,
}
_TOKENS = {"method": "token_selection"}
_AGAIN = {"gradient_checkpointing": "non-reentrant"}
WAYS: dict[str, dict[str, Any]] = {
    "full": {"lora_r": 0},
    "lora": {},
    "lora+checkpointing": _AGAIN,
    "token selection": {"methods": [_TOKENS]},
    "spt": {"methods": [_PQ, _FFN]},
    "all": {"methods": [_TOKENS, _PQ, _FFN], **_AGAIN},
    "sara": {"methods": [{"method": "sara"}], "lora_r": 0},
    "sara rows": {"methods": [{"method": "sara", "block": "rows"}], "lora_r": 0},
}


def make_recipe(model: str, way: str, tokens: int) -> Any:
    from sparsetrain.recipes.finetune import Recipe

    values = {"model": model, "data": "none", "task": MODELS[model], "seq_len": tokens, "methods": [], **WAYS[way]}
    return Recipe.from_values(values)


def predict(model: str, way: str, tokens: int) -> dict[str, Any]:
    from sparsetrain.hf.study.recipe_trace import outline
    from sparsetrain.hf.train.assemble import open_config

    recipe = make_recipe(model, way, tokens)
    _, config = open_config(recipe, lambda _event: None, ())
    found = outline(recipe, config, bf16=False, lengths=(tokens,))
    peak = found.peak(tokens)
    static = found.static
    return {
        "parameters": static.parameters_trainable + static.parameters_frozen,
        "gradients": static.gradients,
        "optimizer": static.optimizer,
        "saved": peak.saved_in_full,
        "peak": peak.total,
        "phase": peak.phase,
        "how": found.how(tokens),
    }


def measure(model: str, way: str, tokens: int) -> dict[str, Any]:
    """Real weights, all layers, two steps to warm up and one each for what is counted."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from sparsetrain import plan, sparsify
    from sparsetrain.hf.model.checkpointing import recompute
    from sparsetrain.hf.model.models import add_lora
    from sparsetrain.hf.study.recipe_trace import example_batch, training_step, without_dropout
    from sparsetrain.hf.train.assemble import open_config
    from sparsetrain.measure.memory import peak_memory, reset_peak, saved_activations, static_memory
    from sparsetrain.planner.step_tracer import trace_step
    from sparsetrain.surgery.method import blank_state

    recipe = make_recipe(model, way, tokens)
    path, config = open_config(recipe, lambda _event: None, ())
    without_dropout(config, recipe)
    kind = AutoModelForSequenceClassification if recipe.task == "classify" else AutoModelForCausalLM
    network: Any = kind.from_pretrained(path, config=config, dtype=torch.float32, attn_implementation="sdpa")
    handle = None
    if recipe.methods:
        edits = plan(network, *recipe.configs).edits
        handle = sparsify(network, *recipe.configs, state=blank_state(edits))
    network = add_lora(network, recipe, handle, ["classifier"] if recipe.task == "classify" else [])
    network.train()
    if recipe.gradient_checkpointing != "none":
        recompute(network)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-5, fused=True)
    batch = example_batch(recipe, config, tokens, rows=1)
    step = training_step(network, batch, False)

    def train() -> None:
        step().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    train()
    train()
    step().backward()
    static = static_memory(network, optimizer)
    optimizer.zero_grad(set_to_none=True)
    saved = saved_activations(network, step)
    before = peak_memory().rss_bytes or 0
    reset_peak()
    train()
    above = (peak_memory().rss_peak_bytes or 0) - before
    trace = trace_step(network, step, None)
    optimizer.zero_grad(set_to_none=True)
    fixed = static.total - static.gradients
    live, most = 0.0, float(static.gradients)
    for segment in (trace.before, *trace.forward, trace.head, *reversed(trace.backward)):
        most = max(most, live + segment.peak)
        live += segment.kept
    return {
        "parameters": static.parameters_trainable + static.parameters_frozen,
        "gradients": static.gradients,
        "optimizer": static.optimizer_trainable + static.optimizer_frozen,
        "saved": saved.by_component,
        "peak": fixed + most,
        "peak_resident": fixed + above,
    }


def compare(predicted: dict[str, Any], measured: dict[str, Any]) -> dict[str, float]:
    """Predicted / measured - 1 of the peaks and of every component that holds at least 1 % of the saved bytes."""
    peaks = [name for name in ("peak", "peak_resident") if name in measured]
    errors = {name: predicted["peak"] / measured[name] - 1 for name in peaks}
    total = sum(measured["saved"].values())
    for name, size in measured["saved"].items():
        if size >= 0.01 * total:
            errors[name] = predicted["saved"][name] / size - 1
    return errors


def cell(model: str, way: str, tokens: int) -> dict[str, Any]:
    predicted = predict(model, way, tokens)
    # freed memory goes back to the system at once, so that peaks are those of tensors
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    measured = in_own_process("bench.planner.accuracy:measure", model, way, tokens, environment=environment)
    exact = all(predicted[name] == measured[name] for name in ("parameters", "gradients", "optimizer"))
    errors = compare(predicted, measured)
    worst = max(errors.values(), key=abs)
    return {
        "predicted": predicted, "measured": measured, "static_exact": exact, "errors": errors, "worst_error": worst,
    }  # fmt: skip


def cells(asked: Asked) -> list[Cell]:
    def of(model: str, way: str, tokens: int) -> Cell:
        return Cell(f"{model} / {way} / {tokens}", lambda: cell(model, way, tokens))

    return [
        of(model, way, tokens)
        for model in asked.settings["models"]
        for way in WAYS
        for tokens in asked.settings["lengths"]
    ]


BENCHMARKS = [
    Benchmark(
        name="planner_accuracy",
        measures="memory of a training step as the planner predicts it, against a measured step on the CPU",
        cells=cells,
        settings={"models": list(MODELS), "lengths": list(LENGTHS)},
        quick={"models": ["minilm"], "lengths": [128]},
        under="cells",
        shows=("static_exact", "worst_error"),
    )
]
