"""One training step of a recipe as a function, without the Trainer around it: what `profile` and `bench` measure.

It does what the Trainer's step does: forward and backward on selected tokens for each of `grad_accum` batches,
clipping, what methods do to gradients, fused AdamW, and the methods' schedules.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from sparsetrain.hf.data.random_tokens import RANDOM, random_images, random_rows
from sparsetrain.hf.model import models
from sparsetrain.hf.model.checkpointing import offloads, recompute
from sparsetrain.hf.train import assemble
from sparsetrain.hf.train.parts import Parts
from sparsetrain.hf.train.rows import calibration_batches, text_reader
from sparsetrain.hf.train.tasks import training_loss
from sparsetrain.planner.image_sizes import image_shape
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.recipes.tasks import task_of
from sparsetrain.runs.events import Report, silent
from sparsetrain.surgery.apply import Handle, sparsify

CALIBRATION_TOKENS = 2048
"""Random tokens that a conversion is fitted on when there is no data: its shapes count here, not its quality."""
MIDDLE, STEPS = 501, 1000
"""Steps are those in the middle of a run: past any warm-up, before any dense tail."""


@dataclass
class TrainingStep:
    """Call it to train one optimizer step; batches are taken in turn."""

    recipe: Recipe
    model: Any
    handle: Handle | None
    optimizer: torch.optim.Optimizer
    batches: list[dict[str, Tensor]]
    autocast: bool = False
    _next: int = 0
    _done: int = 0

    def __call__(self) -> float:
        total = 0.0
        for _ in range(self.recipe.grad_accum):
            loss = self.loss() / self.recipe.grad_accum
            loss.backward()
            total += float(loss.detach())
        if self.recipe.max_grad_norm > 0:
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, self.recipe.max_grad_norm)
        if self.handle is not None:
            self.handle.adjust_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.handle is not None:
            self._done += 1
            self.handle.step(MIDDLE + self._done % (STEPS // 4), STEPS, 1 / self.recipe.grad_accum)
        return total

    def begin_with(self, batches: list[dict[str, Tensor]]) -> None:
        """Take these batches in turn, the first of them next."""
        self.batches, self._next = batches, 0

    def loss(self) -> Tensor:
        """The loss of the next batch."""
        batch = self.batches[self._next % len(self.batches)]
        self._next += 1
        device = next(iter(batch.values())).device.type
        context = torch.autocast(device, torch.bfloat16) if self.autocast else contextlib.nullcontext()
        with context:
            return training_loss(self.model, {**batch, **self._options}, self.recipe.task)

    @property
    def _options(self) -> dict[str, Any]:
        # encoders know no such argument
        return {"use_cache": False} if task_of(self.recipe.task).causal else {}


def open_measured_parts(recipe: Recipe, report: Report = silent, like: Recipe | None = None) -> Parts:
    """The parts of a run that is measured, not kept: as `assemble.open_parts`, with random rows for `RANDOM` data.

    Raises:
        ValueError, PlanError: the recipe does not fit the machine, the model or the data.
    """
    if recipe.data != RANDOM:
        return assemble.open_parts(recipe, report, like)
    device = assemble.pick_device(recipe)
    path, config = assemble.open_config(recipe, report, (like or recipe).configs)
    planned = assemble.check_and_plan(recipe, config, device)
    rows = max(recipe.batch_size * recipe.grad_accum * 2, -(-CALIBRATION_TOKENS // recipe.seq_len))
    task = task_of(recipe.task)
    if task.images:
        bundle = random_images(rows, image_shape(config), recipe.seed)
    else:
        bundle = random_rows(rows, recipe.seq_len, config.vocab_size, classify=task.labelled, seed=recipe.seed)
    return Parts(
        recipe=recipe.model_copy(update={"calibration_tokens": min(recipe.calibration_tokens, CALIBRATION_TOKENS)}),
        device=device,
        path=path,
        config=config,
        plan=planned,
        tokenizer=None,
        bundle=bundle,
    )


def build_step(parts: Parts, report: Report = silent) -> TrainingStep:
    """Load the model of a recipe, convert it, add LoRA, and make its training step.

    Raises:
        ValueError, PlanError: as `assemble.load_model`, `sparsify` and `models.add_lora`.
    """
    model, new_modules = assemble.load_model(parts)
    return convert_step(model, new_modules, parts, report)


def convert_step(model: Any, new_modules: list[str], parts: Parts, report: Report = silent) -> TrainingStep:
    """As `build_step`, for a dense model that is loaded already; the model is changed in place."""
    recipe = parts.recipe
    handle = None
    if recipe.methods:
        handle = sparsify(
            model,
            *(config.sparse_at_once() for config in recipe.configs),
            calibration=calibration_batches(parts),
            read=text_reader(parts),
            seed=recipe.seed,
            deploy=recipe.deployment,
            progress=lambda name, share: report({"event": "phase", "name": name, "share": share}),
        )
        handle.step(MIDDLE, STEPS, 1 / recipe.grad_accum)
    model = models.add_lora(model, recipe, handle, new_modules)
    model.train()
    _recompute(model, recipe, offloads(recipe, parts.device))
    set_seed(recipe.seed)
    return TrainingStep(
        recipe=recipe,
        model=model,
        handle=handle,
        optimizer=torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=assemble.learning_rate(recipe, handle),
            weight_decay=recipe.weight_decay,
            fused=True,
        ),
        batches=_batches(parts),
        autocast=assemble.autocasts(recipe, parts.device),
    )


def _batches(parts: Parts) -> list[dict[str, Tensor]]:
    rows, size = parts.bundle.train, parts.recipe.batch_size
    wanted = min(len(rows), 2 * size * parts.recipe.grad_accum)
    batches = []
    for start in range(0, wanted, size):
        batch = parts.bundle.collate_fn([rows[i] for i in range(start, min(start + size, wanted))])
        batches.append({name: tensor.to(parts.device) for name, tensor in batch.items()})
    return batches


def _recompute(model: Any, recipe: Recipe, offload: bool) -> None:
    if recipe.gradient_checkpointing == "none":
        return
    reentrant = recipe.gradient_checkpointing == "reentrant"
    recompute(model, reentrant, offload)
    if reentrant and recipe.lora_r > 0:  # without it a block whose inputs need no gradient passes none on
        model.enable_input_require_grads()


def dense_twin(recipe: Recipe) -> Recipe:
    """The strongest dense recipe beside a sparse one: the same LoRA, optimizer, batch and length; SDPA attention."""
    return recipe.model_copy(update={"methods": ()})
