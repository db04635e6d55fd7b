"""A model without weights, converted and given its LoRA like the real one, then one block of each kind traced.

The full model is built on the meta device, so parameters, gradients and optimizer state are counted exactly. Blocks of
one kind (same modules, shapes, methods, window) are then thinned out to one, and a training step of what is left runs
on hollow tensors (`planner.hollow`) through the very code that trains: conversion, PEFT, checkpointing, loss.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, describe, submodule
from sparsetrain.core.backend import planning_for, watch_ops
from sparsetrain.core.config import MethodConfig
from sparsetrain.hf.model import models
from sparsetrain.hf.model.model_config import context_length
from sparsetrain.hf.study.gpu_dropout import drop_as_on_a_gpu
from sparsetrain.measure.memory import StaticMemory, static_memory
from sparsetrain.planner.hollow import Hollow
from sparsetrain.planner.memory import Layout, StaticBytes
from sparsetrain.planner.outline import Outline
from sparsetrain.planner.tracing import StepTrace, trace_step
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.surgery.apply import Handle, sparsify
from sparsetrain.surgery.method import blank_state
from sparsetrain.surgery.plan import plan
from sparsetrain.surgery.site import Site

SHORTEST = 256


def fit_lengths(recipe: Recipe, window: int | None = None) -> tuple[int, int, int]:
    """Three short lengths that a recipe is traced at; all others are fitted.

    Short, because the gathers of sparse attention at 32k tokens are 100,000 operations, half a minute of tracing. Long
    enough that a method's floor (at least 64 keys) and a sliding window are behind.
    """
    ratios = [
        getattr(config, "keep_ratio", 1.0) or 1.0 for config in recipe.configs if config.method.endswith("attention")
    ]
    # the loss head of selected tokens works in chunks of 128 rows: fewer rows than that fill no chunk
    rows = [128 / (getattr(c, "keep_ratio", None) or 1.0) for c in recipe.configs if c.method == "token_selection"]
    smallest = max([SHORTEST, window or 0, *(64 / ratio for ratio in ratios), *rows])
    shortest = 2 ** math.ceil(math.log2(smallest))
    return (shortest, 2 * shortest, 4 * shortest) if window is None else (2 * shortest, 3 * shortest, 4 * shortest)


def outline(
    recipe: Recipe, config: Any, *, bf16: bool, gpu: bool = False, lengths: tuple[int, ...] | None = None
) -> Outline:
    """Trace a recipe on the model that a transformers config describes.

    Args:
        recipe: what is trained and how; its device, data, steps, length and batch play no part.
        config: the model's config; it is changed.
        bf16: weights (LoRA) or autocast (all weights) in bf16, as `finetune` chooses on a GPU.
        gpu: trace what a GPU's kernels keep; the trace itself runs on the CPU.
        lengths: tokens to trace at; by default three from which any length is fitted.

    Raises:
        ValueError, PlanError, UnknownFamily: the recipe does not fit the model.
    """
    without_dropout(config, recipe)
    with watch_ops() as ops, warnings.catch_warnings(), planning_for("cuda") if gpu else nullcontext():
        warnings.simplefilter("ignore")
        built = _Built(recipe, config, bf16, gpu)
        if lengths is None:
            context = context_length(config) or 2**30
            lengths = fit_lengths(recipe, built.window)
            if lengths[-1] > context:  # a short encoder: its embeddings end there
                lengths = (context // 4, context // 2, context)
        traces = {tokens: built.trace(tokens) for tokens in lengths}
        static, trained = built.static()
    return Outline(
        traces=traces,
        layout=built.layout,
        static=static,
        ops=tuple(sorted(ops)),
        parameters=built.parameters,
        trained=trained,
    )


def without_dropout(config: Any, recipe: Recipe) -> None:
    """Attention dropout off where methods take attention, as `finetune` turns it off."""
    empty = lambda: models.empty_model(config, recipe.task)  # noqa: E731
    models.drop_attention_dropout(config, empty, recipe.configs, lambda _event: None)


class _Built:
    """The thinned-out model on hollow parameters, ready to be traced at any length."""

    def __init__(self, recipe: Recipe, config: Any, bf16: bool, gpu: bool) -> None:
        self.recipe, self.config = recipe, config
        model = models.empty_model(config, recipe.task)
        self.parameters = models.num_parameters(model)[0]
        self.handle = convert_empty(model, recipe, bf16 and recipe.lora_r > 0)
        windows = [site.window for site in describe(model).attentions if site.window]
        self.window = max(windows, default=None)
        new = [name for name, _ in model.named_children() if name in ("classifier", "score", "pre_classifier")]
        new = new if recipe.task == "classify" else []
        if _names_a_layer(recipe):
            model = models.add_lora(model, recipe, self.handle, new)
            self.layout = thin_out(model)
        else:  # blocks of one kind get the same factors, and PEFT takes a second for forty blocks
            self.layout = thin_out(model)
            model = models.add_lora(model, recipe, self.handle, new)
        self.memory = _whole_memory(model, self.layout)
        self.in_blocks, self.outside = _trained(model)
        self.hollow = Hollow(seed=recipe.seed)
        fill(model, self.hollow)
        _settle(model, self.hollow)
        model.train()
        if gpu:
            drop_as_on_a_gpu(model, recipe)
        if recipe.gradient_checkpointing != "none":
            recompute(model)
        self.model = model
        self.cast = bf16 and recipe.lora_r == 0
        self.without_gradient: list[set[str]] = []

    def trace(self, tokens: int) -> StepTrace:
        batch = example_batch(self.recipe, self.config, tokens, rows=1)
        trace = trace_step(self.model, training_step(self.model, batch, self.cast), self.hollow)
        blocks = [submodule(self.model, block.name) for block in describe(self.model).blocks]
        self.without_gradient = [
            {name for name, p in block.named_parameters() if p.requires_grad and p.grad is None} for block in blocks
        ]
        for parameter in self.model.parameters():
            parameter.grad = None
        return trace

    def static(self) -> tuple[StaticBytes, int]:
        """Exact bytes of the full model, and the numbers trained. AdamW keeps two moments in a parameter's dtype and a
        step of 4 bytes for each that receives gradients."""
        kept = [
            [p for name, p in params.items() if name not in without]
            for params, without in zip(self.in_blocks, self.without_gradient, strict=True)
        ]
        own = [kept[i] for i in self.layout.of_block]
        trained = [*self.outside, *(p for params in own for p in params)]
        gradients = sum(_size(p) for p in trained)
        static = StaticBytes(
            parameters_trainable=self.memory.parameters_trainable,
            parameters_frozen=self.memory.parameters_frozen,
            buffers=self.memory.buffers,
            gradients=gradients,
            optimizer=2 * gradients + 4 * len(trained),
            grads_by_block=tuple(sum(_size(p) for p in params) for params in own),
        )
        return static, sum(p.numel() for p in trained)


def _settle(model: nn.Module, hollow: Hollow) -> None:
    """What modules derive from their weights (packed copies) is made anew from the hollow ones."""
    with hollow:
        for module in model.modules():
            if isinstance(module, Site):
                module.derive()


def _names_a_layer(recipe: Recipe) -> bool:
    """Do the LoRA targets name blocks, so that blocks of one kind may differ?"""
    targets = [] if recipe.lora_targets == "all-linear" else recipe.lora_targets
    return any(part.isdigit() for target in targets for part in target.split("."))


def _whole_memory(model: Any, layout: Layout) -> StaticMemory:
    """Bytes of the whole model, from one with a block of each kind."""
    total = asdict(static_memory(model))
    blocks = [submodule(model, block.name) for block in describe(model).blocks]
    for i, block in enumerate(blocks):
        more = layout.of_block.count(i) - 1
        for name, size in asdict(static_memory(block)).items():
            total[name] += more * size
    return StaticMemory(**total)


def _trained(model: Any) -> tuple[list[dict[str, nn.Parameter]], list[nn.Parameter]]:
    """(relative name -> trained parameter of each block, those outside the blocks); tied ones once."""
    blocks = [submodule(model, block.name) for block in describe(model).blocks]
    inside = [{name: p for name, p in block.named_parameters() if p.requires_grad} for block in blocks]
    known = {id(p) for params in inside for p in params.values()}
    return inside, [p for p in model.parameters() if p.requires_grad and id(p) not in known]


def _size(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def convert_empty(model: Any, recipe: Recipe, bf16: bool) -> Handle | None:
    """Convert a model on the meta device with blank states."""
    if bf16:
        model.to(torch.bfloat16)
    if not recipe.methods:
        return None
    handle = sparsify(model, *recipe.configs, state=blank_state(plan(model, *recipe.configs).edits))
    _to_meta(model)
    return handle


def _to_meta(model: nn.Module) -> None:
    """What methods added from blank states joins the rest on the meta device."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta":
                module._buffers[name] = buffer.to("meta")


def training_step(model: Any, batch: dict[str, Tensor], autocast: bool) -> Callable[[], Tensor]:
    """One forward as the Trainer runs it: loss out, everything else freed."""

    def step() -> Tensor:
        device = batch["input_ids"].device.type
        cast: AbstractContextManager[Any] = torch.autocast(device, torch.bfloat16) if autocast else nullcontext()
        with cast:
            return model(**batch).loss

    return step


def example_batch(recipe: Recipe, config: Any, tokens: int, rows: int) -> dict[str, Tensor]:
    """Full rows, as packed text gives them; with a mask and one label a row to classify."""
    vocab = config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(recipe.seed)
    ids = torch.randint(vocab, (rows, tokens), generator=generator)
    if recipe.task == "classify":
        labels = torch.zeros(rows, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    mask = {"attention_mask": torch.ones_like(ids)} if recipe.task == "sft" else {}
    return {"input_ids": ids, "labels": ids.clone(), **mask}


def recompute(model: Any) -> None:
    """Turn on non-reentrant gradient checkpointing under the name that this transformers has."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    model.config.use_cache = False  # transformers turns it off too, with a warning
    enable({"use_reentrant": False})


def thin_out(model: Any) -> Layout:
    """Keep the first block and one of each kind of the others; returns which stands for which."""
    anatomy = describe(model)
    kinds = _kinds(model, anatomy)
    kept, place = [0], {}
    of_block = [0]
    for layer in range(1, len(kinds)):
        if kinds[layer] not in place:
            place[kinds[layer]] = len(kept)
            kept.append(layer)
        of_block.append(place[kinds[layer]])
    parent_name, _, _ = anatomy.blocks[0].name.rpartition(".")
    parent = submodule(model, parent_name)
    blocks = [parent._modules[anatomy.blocks[layer].name.rpartition(".")[2]] for layer in kept]
    parent._modules.clear()
    for i, block in enumerate(blocks):
        parent._modules[str(i)] = block
        for module in block.modules():  # type: ignore[union-attr]
            if hasattr(module, "layer_idx"):  # its place in the key-value cache
                module.layer_idx = i  # type: ignore[assignment]
    config = model.config.get_text_config()
    config.num_hidden_layers = len(kept)
    types = getattr(config, "layer_types", None)
    if types:
        config.layer_types = [types[layer] for layer in kept]
    return Layout(of_block=tuple(of_block))


def _kinds(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """What distinguishes the blocks: modules, shapes, what is trained, methods, windows."""
    config: Any = model.config
    types = getattr(config.get_text_config(), "layer_types", None) or [""] * len(anatomy.blocks)
    kinds = []
    for block, kind in zip(anatomy.blocks, types, strict=True):
        parts: list[Any] = [kind, None if block.attention is None else block.attention.window]
        for name, module in submodule(model, block.name).named_modules():
            params = [
                (n, tuple(p.shape), str(p.dtype), p.requires_grad)
                for n, p in module._parameters.items()
                if p is not None
            ]
            own = module.config if isinstance(getattr(module, "config", None), MethodConfig) else None
            parts.append((name, type(module).__name__, params, repr(own)))
        kinds.append(json.dumps(parts, default=str))
    return kinds


def fill(model: nn.Module, hollow: Hollow) -> None:
    """Give the meta parameters and buffers hollow storage; ties stay ties, integer buffers become zeros."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the old tensor is kept, or its id could be used again
    with hollow:
        for module in model.modules():
            for name, old in module._parameters.items():
                if old is not None:
                    if id(old) not in made:
                        new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                        made[id(old)] = (old, nn.Parameter(new, requires_grad=old.requires_grad))
                    module._parameters[name] = made[id(old)][1]  # type: ignore[assignment]
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type == "meta":
                    if id(buffer) not in made:
                        made[id(buffer)] = (buffer, torch.zeros(buffer.shape, dtype=buffer.dtype, device="cpu"))
                    module._buffers[name] = made[id(buffer)][1]
