"""What every rank checks on whole models: losses, gradients and weights equal one device's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsetrain.parallel.checkpoint import full_weights, load, save
from sparsetrain.parallel.grid import ParallelGrid
from sparsetrain.parallel.linear import Mode
from sparsetrain.parallel.model import parallelize
from tests.families import FAMILIES, Family

ROWS = 8
EXACT = {"gpt2": 1e-11, "bert": 1e-11, "llama": 1e-6}
"""Llama's norms and rotations are in fp32 whatever the model is."""


def family(name: str) -> Family:
    return FAMILIES[name]


def build(name: str) -> Any:
    return family(name).model().double().train()


def batch(name: str, step: int) -> dict[str, Tensor]:
    found = family(name).batch(rows=ROWS, tokens=12, seed=step)
    found["labels"] = found["input_ids"] if family(name).causal else torch.arange(ROWS) % 2
    return found


def loss_of(model: Any, rows: dict[str, Tensor]) -> Tensor:
    """This rank's sum over the number of all rows: they are of one length."""
    return model(**rows).loss * rows["input_ids"].shape[0] / ROWS


def serial(name: str, steps: int) -> tuple[Any, list[Tensor]]:
    model, norms = build(name), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(name, step)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
    return model, norms


def trains_as_one_device(name: str, sizes: tuple[int, ...], mode: Mode, steps: int = 3) -> None:
    plain, norms = serial(name, steps)
    tolerance = EXACT[name]
    with ParallelGrid(*sizes) as grid:
        cut = parallelize(build(name), grid, mode=mode)
        optimizer = torch.optim.AdamW(cut.model.parameters(), lr=1e-3)
        for step in range(steps):
            optimizer.zero_grad()
            loss_of(cut.model, cut.rows(batch(name, step))).backward()
            norm = cut.finish_gradients(max_norm=1.0)
            torch.testing.assert_close(norm, norms[step].double(), rtol=tolerance, atol=tolerance)
            optimizer.step()
        found = full_weights(cut)
        if grid.rank == 0:
            for key, parameter in plain.named_parameters():
                torch.testing.assert_close(
                    found[key], parameter.detach(), rtol=0, atol=20 * tolerance, msg=lambda m, key=key: f"{key}: {m}"
                )


def checkpoints_move(folder: str, grids: list[tuple[tuple[int, ...], Mode]], name: str = "llama") -> None:
    """A step on each grid, each from the checkpoint of the one before, equal the same steps on one device."""
    plain, _ = serial(name, len(grids))
    for step, (sizes, mode) in enumerate(grids):
        with ParallelGrid(*sizes) as grid:
            cut = parallelize(build(name), grid, mode=mode)
            optimizer = torch.optim.AdamW(cut.model.parameters(), lr=1e-3)
            if step:
                load(cut, Path(folder) / str(step - 1), optimizer)
            loss_of(cut.model, cut.rows(batch(name, step))).backward()
            cut.finish_gradients(max_norm=1.0)
            optimizer.step()
            save(cut, Path(folder) / str(step), optimizer)
            # what was read again is what was written, to the bit
            before = [parameter.detach().clone() for parameter in cut.model.parameters()]
            load(cut, Path(folder) / str(step), optimizer)
            assert all(torch.equal(a, b) for a, b in zip(before, cut.model.parameters(), strict=True))
            found = full_weights(cut)
    if found:  # on rank 0: a plain model takes the last one's weights
        dense = build(name)
        dense.load_state_dict(found, strict=False)
        for key, parameter in plain.named_parameters():
            torch.testing.assert_close(dense.get_parameter(key), parameter, rtol=0, atol=20 * EXACT[name])
