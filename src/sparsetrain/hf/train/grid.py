"""pretrain_on_grid(): one dense run from random weights on a grid of processes, with a loop of its own.

Every process reads the same rows and takes its part of each batch, so the order of rows is that of one process, and so
is every loss. Checkpoints are full weights and optimizer state: `resume` goes on with any grid.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import get_scheduler, set_seed

from sparsetrain.core.files import to_json, write_whole
from sparsetrain.hf.model.architectures import build_model
from sparsetrain.hf.train.parts import Parts
from sparsetrain.hf.train.pretrain import open_parts
from sparsetrain.parallel.checkpoint import load, save
from sparsetrain.parallel.grid import ParallelGrid
from sparsetrain.parallel.linear import Mode, TPLinear
from sparsetrain.parallel.model import GridModel, parallelize
from sparsetrain.parallel.shape import GridShape
from sparsetrain.recipes.on_grid import check_on_grid
from sparsetrain.recipes.pretrain import PretrainRecipe
from sparsetrain.runs.events import Report, silent

STATE = "grid_state.json"


def pretrain_on_grid(
    recipe: PretrainRecipe, shape: GridShape, mode: Mode = "plain", report: Report = silent
) -> dict[str, Any] | None:
    """Train; `output` then holds `model/` (dense, for plain transformers), `checkpoint-N/` and `result.json`.

    Returns:
        What result.json holds, on rank 0; None elsewhere.

    Raises:
        ValueError: what was asked does not go on a grid; on every rank, before anything is sent.
    """
    _check(recipe, shape)
    own = not distributed.is_initialized()
    if own:
        distributed.init_process_group("gloo")
    try:
        with ParallelGrid(shape.data, shape.z, shape.x, shape.y) as grid:
            parts = open_parts(recipe, report if grid.rank == 0 else silent)
            set_seed(recipe.seed)  # the same weights as in one process
            cut = parallelize(build_model(parts.config, recipe.task).train(), grid, mode=mode)
            grid.seed(recipe.seed, rows_everywhere=mode == "plain")
            losses = _train(cut, parts, report if grid.rank == 0 else silent)
            save(cut, Path(recipe.output) / "model")
            return _written(cut, parts, losses) if grid.rank == 0 else None
    finally:
        if own:
            distributed.destroy_process_group()


def _check(recipe: PretrainRecipe, shape: GridShape) -> None:
    if "RANK" not in os.environ and not distributed.is_initialized():
        raise ValueError(
            f"--grid {shape} needs {shape.world} processes. Start it with: torchrun --nproc-per-node {shape.world} -m "
            "sparsetrain.cli pretrain ..."
        )
    check_on_grid(recipe)


def _train(cut: GridModel, parts: Parts[PretrainRecipe], report: Report) -> list[float]:
    recipe, model = parts.recipe, cut.model
    steps = recipe.steps or recipe.default_steps
    optimizer = torch.optim.AdamW(
        _groups(cut, recipe.weight_decay), lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps
    )
    rises = recipe.warmup_steps if recipe.warmup_steps >= 1 else math.ceil(steps * recipe.warmup_steps)
    schedule = get_scheduler(recipe.lr_schedule, optimizer, int(rises), steps)
    losses = _resumed(cut, optimizer, schedule, recipe) if recipe.resume else []
    for step, batches in enumerate(_batches(parts, steps)):
        if step < len(losses):
            continue
        total = sum(_targets(batch) for batch in batches)
        loss = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            rows = cut.rows(batch)
            part = _loss(model, rows, total)
            part.backward()
            loss += part.detach().double()
        norm = cut.finish_gradients(recipe.max_grad_norm or None)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        for axis in ("x", "y", "z", "data") if cut.mode == "plain" else ("z", "data"):
            loss = cut.grid.all_reduce(loss, axis).wait()
        losses.append(float(loss))
        if not torch.isfinite(norm):
            raise RuntimeError(f"the gradient is not finite at step {step}. Lower --lr or raise --warmup-steps.")
        report({"event": "note", "text": f"step {step + 1} of {steps}: loss {losses[-1]:.4f}"})
        if recipe.save_every and (step + 1) % recipe.save_every == 0 and step + 1 < steps:
            _checkpoint(cut, optimizer, schedule, recipe, losses)
    return losses


def _targets(batch: dict[str, torch.Tensor]) -> int:
    labels = batch["labels"]
    return int((labels[:, 1:] != -100).sum()) if labels.ndim == 2 else len(labels)


def _loss(model: Any, rows: dict[str, torch.Tensor], total: int) -> torch.Tensor:
    """This rank's sum over the number of all targets of the step."""
    if rows["labels"].ndim == 2:
        return model(**rows, num_items_in_batch=torch.tensor(total)).loss
    return model(**rows).loss * len(rows["labels"]) / total


def _batches(parts: Parts[PretrainRecipe], steps: int) -> Iterator[list[dict[str, torch.Tensor]]]:
    """The global batches of each step, in an order that the seed alone decides."""
    recipe, bundle = parts.recipe, parts.bundle
    generator = torch.Generator().manual_seed(recipe.seed)
    wanted, order = recipe.batch_size * recipe.grad_accum, []
    for _ in range(steps):
        while len(order) < wanted:
            order += torch.randperm(len(bundle.train), generator=generator).tolist()
        taken, order = order[:wanted], order[wanted:]
        cuts = range(0, wanted, recipe.batch_size)
        yield [bundle.collate_fn([bundle.train[i] for i in taken[c : c + recipe.batch_size]]) for c in cuts]


def _groups(cut: GridModel, decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases do not. A cut matrix is flat, so its shape does not tell."""
    decayed, plain = [], []
    for name, parameter in cut.model.named_parameters():
        owner, _, kind = name.rpartition(".")
        matrix = parameter.ndim > 1 or (kind == "weight" and isinstance(cut.cut.get(owner), TPLinear))
        (decayed if matrix else plain).append(parameter)
    return [{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}]


def _checkpoint(cut: GridModel, optimizer: Any, schedule: Any, recipe: PretrainRecipe, losses: list[float]) -> None:
    """The state file is written last: a folder that has one is whole."""
    folder = Path(recipe.output) / f"checkpoint-{len(losses)}"
    save(cut, folder, optimizer)
    if cut.grid.rank == 0:
        write_whole(folder / STATE, to_json({"losses": losses, "schedule": schedule.state_dict()}) + "\n")
    distributed.barrier()


def _resumed(cut: GridModel, optimizer: Any, schedule: Any, recipe: PretrainRecipe) -> list[float]:
    found = sorted(Path(recipe.output).glob(f"checkpoint-*/{STATE}"), key=lambda p: int(p.parent.name.split("-")[1]))
    if not found:
        raise ValueError(f"resume: {recipe.output} holds no checkpoint of a grid. Leave --resume out.")
    load(cut, found[-1].parent, optimizer)
    state = json.loads(found[-1].read_text())
    schedule.load_state_dict(state["schedule"])
    for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = rate
    return state["losses"]


def _written(cut: GridModel, parts: Parts[PretrainRecipe], losses: list[float]) -> dict[str, Any]:
    output = Path(parts.recipe.output)
    parts.config.architectures = [type(cut.model).__name__]
    parts.config.save_pretrained(output / "model")
    if parts.tokenizer is not None:
        parts.tokenizer.save_pretrained(output / "model")
    result = {"grid": str(cut.grid.shape), "mode": cut.mode, "steps": len(losses), "losses": losses}
    result |= {"report": cut.report(), "moved_elements": dict(cut.grid.traffic.moved), "output": str(output)}
    write_whole(output / "result.json", to_json(result, indent=2) + "\n")
    return result
