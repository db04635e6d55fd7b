"""DDP without find_unused_parameters: every method trains, and as one process without DDP does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import sparsetrain
from sparsetrain import FloodFillAttention, PQAttention, RoutedFFN, SemiStructured, TokenSelection
from sparsetrain.surgery.idle import attach_zeros, places_of
from tests.families import FAMILIES
from tests.parallel.ranks import start

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")

CASES: dict[str, list[Any]] = {
    "codebook between updates": [PQAttention.example()],
    "codebook without a loss": [PQAttention.from_dict({**PQAttention.example().to_dict(), "codebook_weight": 0.0})],
    "router at the dense limit": [RoutedFFN(num_blocks=4, num_active=4)],
    "router that warms up": [
        RoutedFFN(num_blocks=4, num_active=2, partition="clustered", compensation_rank=4, warmup_ratio=0.02)
    ],
    "tokens and codebook": [TokenSelection(keep_ratio=0.4), PQAttention.example()],
    "flood fill": [FloodFillAttention.example()],
    "2:4": [SemiStructured()],
}


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def converted(family: str, configs: list[Any]) -> tuple[Any, sparsetrain.Handle]:
    model = FAMILIES[family].model()
    return model, sparsetrain.sparsify(model, *configs, calibration=[FAMILIES[family].batch(4, 60, seed=5)])


def train(module: nn.Module, model: Any, handle: sparsetrain.Handle, family: str = "llama", micro: int = 1) -> None:
    """Four steps of AdamW with weight decay, the last two with gradient checkpointing where `micro` is 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    module.train()
    for step in range(4):
        handle.step(step, 100, 1 / micro)
        if step == 2 and micro == 1:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for part in range(micro):
            if isinstance(module, DistributedDataParallel):
                module.require_backward_grad_sync = part == micro - 1
            batch = FAMILIES[family].batch(2, 60, seed=step * micro + part)
            labels = batch["input_ids"] if FAMILIES[family].causal else torch.tensor([0, 1])
            (module(**batch, labels=labels).loss / micro).backward()
        handle.adjust_gradients()
        optimizer.step()
        optimizer.zero_grad()


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("micro", [1, 2], ids=["", "accumulated"])
@pytest.mark.parametrize("name", CASES)
def test_under_ddp_a_step_is_what_it_is_without(name: str, micro: int, one_rank: None) -> None:
    model, handle = converted("llama", CASES[name])
    train(DistributedDataParallel(model), model, handle, micro=micro)
    distributed.destroy_process_group()
    try:
        plain, handle = converted("llama", CASES[name])
        train(plain, plain, handle, micro=micro)
    finally:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    assert_same(model, plain)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_routers_that_stand_in_a_larger_forward(family: str, one_rank: None) -> None:
    model, handle = converted(family, CASES["router at the dense limit"])
    before = copy.deepcopy(handle.state())
    train(DistributedDataParallel(model), model, handle, family)
    for key, tensors in handle.state().items():
        assert all(torch.equal(tensor, before[key][name]) for name, tensor in tensors.items()), key


def test_zeros_are_written_so_that_nothing_spreads(one_rank: None) -> None:
    idle, x = nn.Parameter(torch.full((3,), float("nan"))), torch.ones(2, requires_grad=True)
    places = places_of(nn.ParameterDict({"p": idle}))
    out, rest = attach_zeros((x * float("inf"), "rest"), places)
    out.sum().backward()
    assert rest == "rest" and idle.grad is not None and torch.equal(idle.grad, torch.zeros(3))
    assert attach_zeros(x, places_of(nn.Linear(1, 1).requires_grad_(False))) is x
    with torch.no_grad():
        assert attach_zeros(x, places) is x
    torch.optim.AdamW([idle], weight_decay=0.1).step()
    assert idle.grad is None


def test_alone_nothing_is_attached() -> None:
    x = torch.ones(2, requires_grad=True)
    assert attach_zeros(x, places_of(nn.Linear(1, 1))) is x


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name in ("codebook between updates", "router at the dense limit"):
        model, handle = converted("llama", CASES[name])
        train(DistributedDataParallel(model), model, handle)
        torch.save(dict(model.named_parameters()), f"{folder}/{name}.{rank}")
    distributed.barrier()
    distributed.destroy_process_group()


def test_two_ranks(tmp_path: Path) -> None:
    """Two processes, some ten seconds, most of them imports: that ranks really wait for one another, one cannot show.

    Both get the same rows, so that their mean is what one process computes.
    """
    start(_rank, (str(tmp_path),), 2)
    for name in ("codebook between updates", "router at the dense limit"):
        plain, handle = converted("llama", CASES[name])
        train(plain, plain, handle)
        for rank in range(2):
            found: dict[str, Tensor] = torch.load(tmp_path / f"{name}.{rank}")
            for key, parameter in plain.named_parameters():
                torch.testing.assert_close(found[key], parameter, rtol=1e-4, atol=1e-5, msg=key)
