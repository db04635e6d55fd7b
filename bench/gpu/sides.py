"""What is timed on a GPU: a Llama-like model in LoRA and its optimizer, dense or converted, and what its plan says."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import runner

MODELS = {"1b": "llama-3.2-1b", "8b": "llama-3-8b"}
STRONGEST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""What PyTorch's attention may choose from, the first that can, on both sides: cuDNN's is up to 2.3 times as fast as
the default one on Hopper."""
Methods = Sequence[dict[str, Any]]


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


def recipe_of(methods: Methods, **more: Any) -> Any:
    """What `finetune` would be asked; the model is given beside it."""
    from sparsetrain.recipes.finetune import Recipe

    return Recipe.from_values({"model": "llama-3-8b", "data": "none", "methods": list(methods), "lora_r": 16, **more})


class Side:
    """A model in LoRA and its optimizer: dense without methods, else converted.

    Args:
        pieces: in which FFNs run.
    """

    def __init__(self, config: Any, device: torch.device, methods: Methods = (), pieces: int = 1) -> None:
        from transformers import AutoModelForCausalLM

        from sparsetrain import sparsify
        from sparsetrain.hf.model.models import add_lora

        torch.manual_seed(0)
        with device:
            base: Any = AutoModelForCausalLM.from_config(config, dtype=dtype_on(device), attn_implementation="sdpa")
        recipe = recipe_of(methods, tiled_mlp=pieces)
        self.handle = sparsify(base, *recipe.configs) if methods else None
        self.own_loss = any(method["method"] == "token_selection" for method in methods)
        self.base, self.device = base, device
        self.model = add_lora(base, recipe, self.handle, []).train()
        self.model.to(device)
        for name, factor in self.model.named_parameters():
            if "lora_B" in name:  # or no gradient reaches A
                nn.init.normal_(factor, std=0.01)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-5, fused=True)
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
        if self.own_loss:
            return self.model(**batch, num_items_in_batch=batch["labels"].numel()).loss
        hidden = self.base.model(input_ids=batch["input_ids"]).last_hidden_state[:, :-1]
        target = batch["labels"][:, 1:]
        chunk = 2048 if self.device.type == "cuda" else 128
        return selected_loss(hidden.flatten(0, 1), self.base.lm_head.weight, target.flatten(), chunk_rows=chunk)

    def step(self, batches: list[dict[str, Tensor]]) -> None:
        with strongest_attention():
            self.loss(batches[self.steps % len(batches)]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def gradients(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss and every gradient of a step, in fp32."""
        with strongest_attention():
            loss = self.loss(batch)
            loss.backward()
        found = {name: p.grad.float().clone() for name, p in self.trained.items() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.detach().float()} | found

    def saved_bytes(self, batch: dict[str, Tensor]) -> int:
        """What the forward keeps for the backward."""
        from sparsetrain.measure.memory import saved_activations

        with strongest_attention():
            return sum(saved_activations(self.model, lambda: self.loss(batch)).by_component.values())


@contextmanager
def strongest_attention() -> Iterator[None]:
    with sdpa_kernel(STRONGEST, set_priority=True):
        yield


def batches_of(config: Any, tokens: int, device: torch.device, targets: int | None = None) -> list[dict[str, Tensor]]:
    """Rows that differ from step to step; of their tokens the last `targets` have a label, or all."""
    draw, found = torch.Generator().manual_seed(0), []
    for _ in range(4):
        ids = torch.randint(config.vocab_size, (1, tokens), generator=draw)
        labels = ids.clone()
        labels[:, : tokens - (targets or tokens)] = -100
        found.append({"input_ids": ids.to(device), "labels": labels.to(device)})
    return found


def planned(model: str, layers: int, width: int | None, tokens: int, methods: Methods, again: bool) -> float:
    """Bytes of a step's peak above what lies there between steps, as `plan --gpu` predicts it."""
    from sparsetrain.hf.study.recipe_trace import outline

    on_gpu = width is None
    recipe = recipe_of(methods, gradient_checkpointing="non-reentrant" if again else "none")
    config = config_of(model, layers, width)
    peak = outline(recipe, config, bf16=on_gpu, gpu=True, lengths=(tokens,)).peak(tokens)
    return peak.total - peak.parameters - peak.buffers - peak.optimizer


class Plans:
    """Plans that processes of their own make while the GPU measures; without workers each is made when asked for."""

    def __init__(self, workers: int, wanted: Sequence[tuple[Any, ...]]) -> None:
        self.pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers else None
        self.found: dict[str, Future[float]] = {}
        for arguments in wanted if self.pool is not None else ():
            if str(arguments) not in self.found:
                self.found[str(arguments)] = self.pool.submit(planned, *arguments)  # type: ignore[union-attr]

    def of(self, *arguments: Any) -> float | str:
        """The plan, or why there is none: it must not cost the run its measurements."""
        try:
            future = self.found.get(str(arguments))
            found = planned(*arguments) if future is None else future.result(timeout=45)
        except TimeoutError:
            return "not ready"
        except Exception as problem:
            return f"{type(problem).__name__}: {str(problem)[:200]}"
        return found if math.isfinite(found) else "not known"
