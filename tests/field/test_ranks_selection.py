"""Token selection under `fully_shard`: a step's mean over passes and ranks, wherever gradients wait meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, distributed
from torch.distributed.fsdp import fully_shard

import sparsetrain
from sparsetrain import TokenSelection
from tests.families import FAMILIES
from tests.field.ranks_matrix import rows_of
from tests.parallel.ranks import start

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
STEPS, MICRO, RANKS = 3, 4, 2
TARGETS: dict[str, Any] = {"keep_ratio": 0.3, "pool": "targets", "keep_all_targets": True, "train_keys": True}
CASES: dict[str, tuple[TokenSelection, dict[str, bool]]] = {
    "whole gradients wait": (TokenSelection(**TARGETS, context="near"), {"sync": False}),
    "a look at all rows": (TokenSelection(**TARGETS, context="attended"), {}),
    "LoRA, one group": (TokenSelection(**TARGETS, context="near"), {"lora": True, "blocks": False}),
    "rows recomputed": (TokenSelection(keep_ratio=0.3, recompute=True), {}),
}


def trained(
    config: TokenSelection, rank: int, ranks: int, *, lora: bool = False, blocks: bool = True, sync: bool = True
):  # type: ignore[no-untyped-def]
    """Losses, and the trained parameters in full.

    Args:
        blocks: each is sharded by itself, else the model as one. sync: of gradients after every pass, else the last.
    """
    torch.manual_seed(0)
    model: Any = FAMILIES["llama"].model().double()
    inner = model.model
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).double()
    handle = sparsetrain.sparsify(model, config, seed=0)
    if ranks > 1:
        for block in inner.layers if blocks else ():
            fully_shard(block)
        fully_shard(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    losses = []
    model.train()
    for step in range(STEPS):
        handle.step(step, STEPS, ranks / MICRO)
        batches = [rows_of(step, part) for part in range(MICRO)]
        targets = torch.tensor(sum(int(batch["labels"][:, 1:].ne(-100).sum()) for batch in batches))
        mine, loss = batches[rank::ranks], torch.zeros((), dtype=torch.float64)
        for i, batch in enumerate(mine):
            if ranks > 1:
                model.set_requires_gradient_sync(sync or i == len(mine) - 1)
            part = model(**batch, num_items_in_batch=targets).loss * ranks
            part.backward()
            loss += part.detach() / ranks
        if ranks > 1:
            distributed.all_reduce(loss)
        losses.append(loss)
        handle.adjust_gradients()
        optimizer.step()
        handle.updated()
        optimizer.zero_grad()
    found: dict[str, Tensor] = {"losses": torch.stack(losses)}
    for name, parameter in model.named_parameters():
        found[name] = (parameter.full_tensor() if ranks > 1 else parameter).detach()
    return found


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    for name, (config, how) in CASES.items():
        torch.save(trained(config, rank, RANKS, **how), f"{folder}/{name}.{rank}")
    distributed.barrier()
    distributed.destroy_process_group()


def test_a_step_s_mean_on_shards(tmp_path: Path) -> None:
    """Two processes, some fifteen seconds: imports, and twelve short runs."""
    start(work, (str(tmp_path),), RANKS)
    for name, (config, how) in CASES.items():
        alone = trained(config, 0, 1, **how)
        for rank in range(RANKS):
            found = torch.load(tmp_path / f"{name}.{rank}")
            for key, tensor in alone.items():
                torch.testing.assert_close(
                    found[key], tensor, rtol=1e-6, atol=1e-7, msg=lambda m, n=(name, key): f"{n}: {m}"
                )
