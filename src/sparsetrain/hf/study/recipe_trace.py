"""outline(): a recipe's step, traced on a model without weights: converted like the real one, a block of each kind.

The full model is built on the meta device, so parameters, gradients and optimizer state are counted exactly. Blocks of
one kind (same modules, shapes, methods, window) are then thinned out to one, and a training step of what is left runs
on hollow tensors (`planner.hollow`) through the very code that trains: conversion, PEFT, checkpointing, loss.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sparsetrain.core.anatomy import known_parts, submodule
from sparsetrain.core.backend import planning_for, timing_on, watch_ops
from sparsetrain.hf.model import models
from sparsetrain.hf.model.architectures import sequence_tokens
from sparsetrain.hf.model.checkpointing import recompute
from sparsetrain.hf.model.model_config import context_length
from sparsetrain.hf.train.tasks import training_loss
from sparsetrain.planner.four_bit import pack_linears
from sparsetrain.planner.gpu_dropout import drop_as_on_a_gpu
from sparsetrain.planner.hollow import Hollow
from sparsetrain.planner.hollow_model import convert_empty, fill, settle
from sparsetrain.planner.host import keep_on_host
from sparsetrain.planner.image_sizes import image_shape
from sparsetrain.planner.memory import Layout, StaticBytes
from sparsetrain.planner.optimizers import DEFAULT, Shape, state_bytes
from sparsetrain.planner.outline import Outline
from sparsetrain.planner.step_tracer import StepTrace, trace_step
from sparsetrain.planner.thin_model import thin_out, trained_parameters, whole_memory
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.recipes.tasks import task_of

SHORTEST = 256
MOST_CALLS = 100_000
"""Operations, over all traces of a recipe, of a family without a row: a state space that runs token by token takes some
300 a token and block, a minute for three lengths."""


def fit_lengths(recipe: Recipe, window: int | None = None) -> tuple[int, int, int]:
    """Three short lengths that a recipe is traced at; all others are fitted.

    Short, because the gathers of sparse attention at 32k tokens are 100,000 operations, half a minute of tracing. Long
    enough that the methods' floors (at least 64 keys, say) and a sliding window are behind.
    """
    smallest = max([SHORTEST, window or 0, *(config.shortest_trace() for config in recipe.configs)])
    shortest = 2 ** math.ceil(math.log2(smallest))
    return (shortest, 2 * shortest, 4 * shortest) if window is None else (2 * shortest, 3 * shortest, 4 * shortest)


def outline(
    recipe: Recipe,
    config: Any,
    *,
    bf16: bool,
    gpu: bool = False,
    here: bool = False,
    lengths: tuple[int, ...] | None = None,
) -> Outline:
    """Trace a recipe on the model that a transformers config describes.

    Args:
        recipe: what is trained and how; its device, data, steps, length and batch play no part.
        config: the model's config; it is changed.
        bf16: weights (LoRA) or autocast (all weights) in bf16, as `finetune` chooses on a GPU.
        gpu: trace what a GPU's kernels keep; the trace itself runs on the CPU.
        here: training is on this machine: what a run would time first is timed, and refused where it is slower.
        lengths: tokens to trace at; by default three from which any length is fitted.

    Raises:
        ValueError, PlanError, UnknownFamily: the recipe does not fit the model.
    """
    without_dropout(config, recipe)
    planned = planning_for("cuda") if gpu else nullcontext()
    timed = timing_on("cuda:0" if gpu else "cpu") if here else nullcontext()
    with watch_ops() as ops, warnings.catch_warnings(), planned, timed, _no_logs():
        warnings.simplefilter("ignore")
        built = _Built(recipe, config, bf16, gpu)
        if lengths is None and task_of(recipe.task).images:
            row = sequence_tokens(config, recipe)
            lengths = (row, 2 * row, 3 * row)  # one image, two and three
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


@contextmanager
def _no_logs() -> Iterator[None]:
    """torch logs the traceback of every operation that has no shape for these sizes; the error says it in a line."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)


def without_dropout(config: Any, recipe: Recipe) -> None:
    """Attention dropout off where methods take attention, as `finetune` turns it off."""
    empty = lambda: models.empty_model(config, recipe.task)  # noqa: E731
    models.drop_attention_dropout(config, empty, recipe.configs, lambda _event: None)


class ThinStep:
    """A thinned-out model, filled with hollow parameters here: ready to be traced on any batch.

    Args:
        model: on the meta device, a block of each kind.
        layout: the blocks they stand for.
        recipe: how it is trained.
        cast: autocast to bf16.
        gpu: trace what a GPU's kernels keep.
    """

    def __init__(self, model: Any, layout: Layout, recipe: RunRecipe, *, cast: bool, gpu: bool) -> None:
        self.layout, self.recipe, self.cast, self.model = layout, recipe, cast, model
        self.memory = whole_memory(model, layout)
        self.in_blocks, self.outside = trained_parameters(model)
        self.hollow = Hollow(seed=recipe.seed)
        fill(model, self.hollow)
        model.train()  # before anything is packed: a model that is deployed dense runs dense until then
        settle(model, self.hollow)
        if gpu:
            drop_as_on_a_gpu(model, recipe)
        if recipe.gradient_checkpointing != "none":
            recompute(model)
        if gpu and getattr(recipe, "activation_offloading", False):
            keep_on_host(model, self.hollow)
        self.without_gradient: list[set[str]] = []
        self.idle: set[str] = set()  # outside the blocks: of a pair of encoders, the texts'

    def trace(self, batch: dict[str, Tensor]) -> StepTrace:
        step = training_step(self.model, batch, self.cast, self.recipe.task)
        trace = trace_step(self.model, step, self.hollow)
        blocks = [submodule(self.model, block.name) for block in known_parts(self.model).blocks]
        self.without_gradient = [
            {name for name, p in block.named_parameters() if p.requires_grad and p.grad is None} for block in blocks
        ]
        self.idle = {name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None}
        for parameter in self.model.parameters():
            parameter.grad = None
        return trace

    def static(self) -> tuple[StaticBytes, int]:
        """Exact bytes of the full model, and the numbers trained; the optimizer keeps state for those alone."""
        kept = [
            [p for name, p in params.items() if name not in without]
            for params, without in zip(self.in_blocks, self.without_gradient, strict=True)
        ]
        own = [kept[i] for i in self.layout.of_block]
        outside = [p for name, p in self.outside.items() if name not in self.idle]
        trained = [*outside, *(p for params in own for p in params)]
        gradients = sum(_size(p) for p in trained)
        shapes = [Shape(tuple(p.shape), p.element_size()) for p in trained]
        optimizer, on_host = state_bytes(self.recipe.training.get("optim", DEFAULT), shapes)
        static = StaticBytes(
            parameters_trainable=self.memory.parameters_trainable,
            parameters_frozen=self.memory.parameters_frozen,
            # an average of the trained weights is kept in fp32
            buffers=self.memory.buffers + (4 * sum(p.numel() for p in trained) if self.recipe.averages else 0),
            gradients=gradients,
            optimizer=optimizer,
            optimizer_on_host=on_host,
            grads_by_block=tuple(sum(_size(p) for p in params) for params in own),
        )
        return static, sum(p.numel() for p in trained)


class _Built:
    """The model of a recipe, thinned out, ready to be traced at any length."""

    def __init__(self, recipe: Recipe, config: Any, bf16: bool, gpu: bool) -> None:
        if recipe.load_in_8bit:
            raise ValueError("load_in_8bit: what its int8 products keep is not counted. Plan load_in_4bit, or neither")
        self.recipe, self.config = recipe, config
        model = models.empty_model(config, recipe.task)
        self.parameters = models.num_parameters(model)[0]
        self.handle = convert_empty(model, recipe, bf16 and not recipe.trains_all)
        if recipe.load_in_4bit:
            pack_linears(model)
        windows = [site.window for site in known_parts(model).attentions if site.window]
        self.window = max(windows, default=None)
        new = [name for name, _ in model.named_children() if name in ("classifier", "score", "pre_classifier")]
        new = new if task_of(recipe.task).labelled else []
        # the caller of a block holds its input until it has ended, so what is kept by none settles from the third on
        frees = any(config.frees_inputs for config in recipe.configs) and recipe.gradient_checkpointing == "none"
        alone = 2 if frees or (gpu and recipe.activation_offloading) else 1
        if _names_a_layer(recipe):
            model = models.add_lora(model, recipe, self.handle, new)
            self.layout = thin_out(model, alone)
        else:  # blocks of one kind get the same factors, and PEFT takes a second for forty blocks
            self.layout = thin_out(model, alone)
            model = models.add_lora(model, recipe, self.handle, new)
        known = known_parts(model).attentions
        self.thin = ThinStep(model, self.layout, recipe, cast=bf16 and recipe.trains_all, gpu=gpu)
        self.thin.hollow.most_calls = 0 if known else MOST_CALLS

    def trace(self, tokens: int) -> StepTrace:
        return self.thin.trace(example_batch(self.recipe, self.config, tokens, rows=1))

    def static(self) -> tuple[StaticBytes, int]:
        return self.thin.static()


def _names_a_layer(recipe: Recipe) -> bool:
    """Do the LoRA targets name blocks, so that blocks of one kind may differ?"""
    targets = [] if recipe.lora_targets == "all-linear" else recipe.lora_targets
    return any(part.isdigit() for target in targets for part in target.split("."))


def _size(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def training_step(model: Any, batch: dict[str, Tensor], autocast: bool, task: str = "lm") -> Callable[[], Tensor]:
    """One forward as the Trainer runs it: loss out, everything else freed."""

    def step() -> Tensor:
        device = next(iter(batch.values())).device.type
        cast: AbstractContextManager[Any] = torch.autocast(device, torch.bfloat16) if autocast else nullcontext()
        with cast:
            return training_loss(model, batch, task)

    return step


def example_batch(recipe: Recipe, config: Any, tokens: int, rows: int) -> dict[str, Tensor]:
    """Full rows, as packed text gives them; with a mask and one label a row to classify; images that hold the
    tokens."""
    if task_of(recipe.task).images:
        images = rows * max(1, tokens // sequence_tokens(config, recipe))
        pixels = torch.zeros(images, *image_shape(config))
        return {"pixel_values": pixels, "labels": torch.zeros(images, dtype=torch.int64)}
    vocab = config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(recipe.seed)
    ids = torch.randint(vocab, (rows, tokens), generator=generator)
    if task_of(recipe.task).labelled:
        labels = torch.zeros(rows, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    mask = {"attention_mask": torch.ones_like(ids)} if task_of(recipe.task).padded else {}
    return {"input_ids": ids, "labels": ids.clone(), **mask}
