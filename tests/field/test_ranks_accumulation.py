"""Two ranks with two micro-batches each make the gradient of one batch of four rows."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import sparsetrain
from sparsetrain import TokenSelection
from tests.families import FAMILIES
from tests.field.test_accumulation import some_rows
from tests.parallel.ranks import start

CHOICES = {
    "all": TokenSelection(),
    "prefix": TokenSelection(policy="prefix"),
    "paper": TokenSelection.paper(num_tokens=4),
}


def run(rank: int, size: int, folder: str) -> None:
    """Train one step as `rank` of `size`, and write down what it did."""
    torch.set_num_threads(1)
    if size > 1:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    rows = some_rows((1, 55, 30, 10))
    total = sum((row["labels"][1:] != -100).sum() for row in rows)
    found = {}
    for name, config in CHOICES.items():
        model: Any = FAMILIES["llama"].model().train()
        sparsetrain.sparsify(model, config)
        trained: Any = DistributedDataParallel(model) if size > 1 else model
        mine = rows[rank::size]
        loss = 0.0
        for i, row in enumerate(mine):
            apart = trained.no_sync() if size > 1 and i + 1 < len(mine) else contextlib.nullcontext()
            with apart:
                part = size * trained(**{n: x[None] for n, x in row.items()}, num_items_in_batch=total).loss
                part.backward()
            loss += float(part.detach())
        found[name] = {n: p.grad for n, p in model.named_parameters()} | {"loss": torch.tensor(loss)}
    torch.save(found, Path(folder) / f"{size}_{rank}.pt")
    if size > 1:
        distributed.barrier()
        distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
def test_ranks_and_micro_batches_equal_one_process(tmp_path: Path) -> None:
    run(0, 1, str(tmp_path))
    start(run, (2, str(tmp_path)), 2)
    alone, first, second = (torch.load(tmp_path / name) for name in ("1_0.pt", "2_0.pt", "2_1.pt"))
    for choice, expected in alone.items():
        loss = (first[choice]["loss"] + second[choice]["loss"]) / 2
        torch.testing.assert_close(loss, expected.pop("loss"), rtol=1e-5, atol=1e-6)
        for name, gradient in expected.items():
            for rank in (first, second):
                torch.testing.assert_close(rank[choice][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
