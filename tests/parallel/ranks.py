"""Start processes on gloo, each with one thread, and let go of their groups at the end."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed


def assert_on_ranks(check: Callable[..., None], world: int, *args: Any) -> None:
    """Run `check(*args)` on so many ranks; an assertion of any of them is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_one, (world, folder, check, args), nprocs=world)  # type: ignore[attr-defined]


def _one(rank: int, world: int, folder: str, check: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        check(*args)
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
