"""Start processes on gloo, each with one thread, and let go of their groups at the end."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

PRELOADED = ["torch.distributed.fsdp", "torch.distributed.tensor", "sparsetrain.cli.finetune"]
PRELOADED += ["sparsetrain.hf.train.finetune", "peft", "transformers.models.llama.modeling_llama", "matplotlib.figure"]
PRELOADED += ["tests.families"]


def start(work: Callable[..., None], args: tuple[Any, ...], count: int) -> None:
    """`work(rank, *args)` in so many processes; what one of them raises is raised here.

    They are forks of one process that has imported what takes long, instead of each importing it: eight of them
    are there in a second, and spawned on one core in a minute.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(work, args, nprocs=count, start_method="forkserver")  # type: ignore[attr-defined]


def assert_on_ranks(check: Callable[..., None], world: int, *args: Any) -> None:
    """Run `check(*args)` on so many ranks; an assertion of any of them is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        start(_one, (world, folder, check, args), world)


def _one(rank: int, world: int, folder: str, check: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        check(*args)
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
