"""Whole LoRA steps on a GPU: token selection beside the dense step, most telling first, each written as it comes.

Layers of Llama-3.2-1B's and Llama-3-8B's shape with random weights, and of the vocabulary their share. The dense side
is what a user could pick: PyTorch's attention, blocks compiled, a chunked loss head, fused AdamW, with and without
checkpointing; the sparse side draws, gathers and trains inside the timed region. The first cell compares kernels and a
whole step with plain PyTorch; where it is red nothing else is measured. `--device cpu --quick` tries the code.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench import runner
from sparsetrain.measure import compare

MODELS = {"1b": "llama-3.2-1b", "8b": "llama-3-8b"}
DRAWN = {"keep_ratio": 0.3}
AT_END = {"keep_ratio": 0.1, "pool": "targets"}
"""A tenth of the tokens, all at the end of the row: a completion behind its prompt."""
SIDES: dict[str, dict[str, Any]] = {"tokens r=.3": DRAWN, "targets at the end r=.1": AT_END}
AGAINST = ("lora", "lora+checkpointing")
TARGETS = {
    ("tokens r=.3", "lora"): 1.35,
    ("tokens r=.3", "lora+checkpointing"): 1.9,
    ("targets at the end r=.1", "lora"): 1.6,
}
"""Of the ratio at 8,192 tokens."""
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def device_of(asked: runner.Asked) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else asked.device)


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def config_of(model: str, layers: int, width: int | None) -> Any:
    """The shape of some layers of a model, with a share of its vocabulary; `width` makes a tiny one of it."""
    from transformers import AutoConfig

    from sparsetrain.hf.model.model_config import read_config

    config = AutoConfig.for_model(**read_config(MODELS[model]).values)
    config.vocab_size = max(128, config.vocab_size * layers // config.num_hidden_layers // 128 * 128)
    config.num_hidden_layers, config.tie_word_embeddings, config.use_cache = layers, False, False
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    if width is not None:
        config.hidden_size, config.intermediate_size, config.vocab_size = width, 2 * width, 128
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, width // 4
    return config


class Side:
    """A model in LoRA and its optimizer: dense, or converted with what selects tokens.

    Args:
        pieces: in which FFNs run.
    """

    def __init__(self, config: Any, device: torch.device, chosen: dict[str, Any] | None, pieces: int = 1) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        from sparsetrain import TokenSelection, sparsify
        from sparsetrain.surgery.tiled import use_tiled_mlp

        torch.manual_seed(0)
        with device:
            base: Any = AutoModelForCausalLM.from_config(config, dtype=dtype_on(device), attn_implementation="sdpa")
        self.handle = None if chosen is None else sparsify(base, TokenSelection(**chosen))
        use_tiled_mlp(base, pieces)
        self.base, self.device = base, device
        self.model = get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")).train()
        self.model.to(device)
        for name, factor in self.model.named_parameters():
            if "lora_B" in name:  # or no gradient reaches A
                nn.init.normal_(factor, std=0.01)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=True)
        self.steps = 0

    def recompute(self, offload: bool = False) -> None:
        from sparsetrain.hf.model.checkpointing import recompute

        recompute(self.base, offload=offload)

    def compile_blocks(self) -> None:
        for layer in self.base.model.layers:
            layer.compile()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        from sparsetrain.ops.selected_loss import selected_loss

        if self.handle is not None:
            self.handle.step(self.steps)
            return self.model(**batch, num_items_in_batch=batch["labels"].numel()).loss
        hidden = self.base.model(input_ids=batch["input_ids"]).last_hidden_state[:, :-1]
        target = batch["labels"][:, 1:]
        chunk = 2048 if self.device.type == "cuda" else 128
        return selected_loss(hidden.flatten(0, 1), self.base.lm_head.weight, target.flatten(), chunk_rows=chunk)

    def step(self, batches: list[dict[str, Tensor]]) -> None:
        self.loss(batches[self.steps % len(batches)]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def gradient(self, batch: dict[str, Tensor]) -> Tensor:
        self.loss(batch).backward()
        found = torch.cat([p.grad.flatten().double() for p in self.trained if p.grad is not None])
        self.optimizer.zero_grad(set_to_none=True)
        return found


def batches_of(config: Any, tokens: int, device: torch.device, at_end: bool) -> list[dict[str, Tensor]]:
    """Rows that differ from step to step."""
    draw, found = torch.Generator().manual_seed(0), []
    for _ in range(4):
        ids = torch.randint(config.vocab_size, (1, tokens), generator=draw)
        labels = ids.clone()
        if at_end:
            labels[:, : -max(1, tokens // 10)] = -100
        found.append({"input_ids": ids.to(device), "labels": labels.to(device)})
    return found


def correctness(asked: runner.Asked) -> dict[str, Any]:
    """Kernels against plain PyTorch, form by form; and the step: everything selected is the dense gradient."""
    from sparsetrain.ops.selected_rows import choice

    device = device_of(asked)
    dtype = dtype_on(device)
    found: dict[str, Any] = {"device": str(device), "kernels": {}}
    reason = choice.no_kernels(device, dtype, 64)
    for width in (64, 128) if reason is None and device.type == "cuda" else ():
        for form in ((True, False, False, False), (True, False, True, False), (True, False, False, True)):
            named = dict(zip(("causal", "window", "packed", "all keys"), form, strict=True))
            key = f"d={width} " + ", ".join(name for name, value in named.items() if value)
            found["kernels"][key] = choice.fails(device, dtype, width, *form) or "right"
    found["not run"] = reason
    config = config_of("1b", 2, asked.settings["width"] or 512)
    batch = batches_of(config, 64, device, at_end=False)[0]
    dense, everything = Side(config, device, None).gradient(batch), Side(config, device, {"keep_ratio": 1.0})
    error = (everything.gradient(batch) * (64 / 63) - dense).norm() / dense.norm()
    found["all tokens beside dense"] = float(error)
    wrong = [text for text in found["kernels"].values() if text != "right"]
    found["passed"] = not wrong and float(error) < 5 * TOLERANCE[str(dtype).removeprefix("torch.")]
    return found


def measured(asked: runner.Asked, model: str, side: str, against: str, tokens: int, checked: Any) -> dict[str, Any]:
    """One pair of steps, in turns, and what each leaves at its peak."""
    if not checked["passed"]:
        raise SystemExit(f"gpu_steps: nothing is timed over a red test: {checked}")
    device, settings = device_of(asked), asked.settings
    config = config_of(model, settings["layers"][model], settings["width"])
    row: dict[str, Any] = {"model": model, "side": side, "against": against, "tokens": tokens}
    row |= {"layers": config.num_hidden_layers, "dtype": str(dtype_on(device)), "target": TARGETS.get((side, against))}
    batches = batches_of(config, tokens, device, at_end=SIDES[side] is AT_END)
    try:
        dense, sparse = Side(config, device, None), Side(config, device, SIDES[side])
        if against.endswith("checkpointing"):
            dense.recompute()
        steps = [functools.partial(s.step, batches) for s in (dense, sparse)]
        peaks = [peak(step, device) for step in steps]
        row |= {"baseline_peak_bytes": peaks[0], "candidate_peak_bytes": peaks[1]}
        row |= {"eager": compare(*steps, rounds=settings["rounds"], device=device).to_dict()}
        if device.type == "cuda" and tokens in settings["compiled"]:
            dense.compile_blocks()
            row |= {"compiled": compare(*steps, rounds=settings["rounds"], warmup=3, device=device).to_dict()}
    except torch.cuda.OutOfMemoryError:
        row["out_of_memory"] = True
    finally:
        dense = sparse = steps = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    ratios = [row[name]["median"] for name in ("eager", "compiled") if name in row]
    return row | ({"ratio": min(ratios)} if ratios else {})


def peak(step: Callable[[], None], device: torch.device) -> int | None:
    """Bytes above what lies there between steps, after two to warm up; None on a CPU."""
    step()
    step()
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def cells(asked: runner.Asked) -> list[runner.Cell]:
    check = runner.Cell("correctness", lambda: correctness(asked))
    found = [check]
    for tokens in asked.settings["tokens"]:
        for model in asked.settings["layers"]:
            for side in SIDES:
                for against in AGAINST:
                    run = functools.partial(measured, asked, model, side, against, tokens)
                    found.append(runner.Cell(f"{model} {tokens} {side} / {against}", run, uses=(check.key,)))
    return found


BENCHMARKS = [
    runner.Benchmark(
        name="gpu_steps",
        measures="whole LoRA steps on a GPU: token selection beside dense, 1B- and 8B-like layers",
        cells=cells,
        settings={
            "tokens": [8192, 2048, 32768],
            "layers": {"1b": 8, "8b": 4},
            "width": None,
            "compiled": [8192],
            "rounds": 7,
        },
        quick={"tokens": [48], "layers": {"1b": 1}, "width": 32, "rounds": 3},
        dtype="bfloat16; float32 on a CPU",
        shows=("passed", "ratio", "baseline_peak_bytes", "candidate_peak_bytes"),
        environment={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
        needs_gpu=True,
    )
]
