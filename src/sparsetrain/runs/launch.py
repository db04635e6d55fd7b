"""A run on several ranks, as torchrun, `accelerate launch`, mpirun and SLURM start them: join, share a step, end.

A recipe says what is trained, and the launch on how many ranks: those share the `batch_size x grad_accum` rows of each
step, so the same recipe gives the same losses on any number of them, and a run goes on with more or fewer.

The first rank writes and speaks. A rank that fails says why, once; the others end without a word.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import distributed, nn

from sparsetrain.core import ranks
from sparsetrain.core.errors import RankFailed
from sparsetrain.core.launchers import as_torchrun_says
from sparsetrain.recipes.run import RunRecipe
from sparsetrain.runs.claim import claimed
from sparsetrain.surgery.apply import Handle

AGAIN = "The same command with --resume goes on from the last whole checkpoint, on any number of ranks."
PATIENCE_S = 10.0
"""For a rank that tells of a failure: a launcher ends all others, and it too, as soon as the first has exited. And for
one that has ended well, until all have."""
_ends = itertools.count()
_LOST = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|timed? ?out|remote process|process group",
    re.IGNORECASE,
)
"""How a collective says that another rank is not there any more."""


def asked_ranks() -> int:
    """Ranks that the launcher has started; 1 without one."""
    value = os.environ.get("WORLD_SIZE", "")
    return int(value) if value.isdigit() and "RANK" in os.environ else 1


@contextmanager
def joined(device: str = "auto") -> Iterator[None]:
    """Be one of the launcher's ranks until the block ends. Alone, or where a process group runs already: nothing.

    Args:
        device: of the recipe; on a GPU each rank takes that of its local number.

    Raises:
        RankFailed: this rank ended because another did, which has said why.
        ValueError: there is no GPU for this rank; or what `as_torchrun_says` raises.
    """
    as_torchrun_says(os.environ)
    if asked_ranks() == 1 or distributed.is_initialized():
        yield
        return
    cpu = device == "cpu" or not torch.cuda.is_available()
    if not cpu:
        _take_gpu()
    distributed.init_process_group("gloo" if cpu else "cpu:gloo,cuda:nccl")
    stopped, failed = threading.Event(), False
    try:
        with _ended_by_launcher(stopped):
            yield
            _leave_together()
    except BaseException as error:
        failed, was_stopped = True, stopped.is_set()
        stopped.set()
        told = _of_all(error, was_stopped)
        if told is error:
            raise
        raise told from error
    finally:
        # gloo's, held until the process ends, takes it down then; NCCL's would wait for ranks that have failed
        if cpu or not failed:
            with contextlib.suppress(RuntimeError):
                distributed.destroy_process_group()


def _take_gpu() -> None:
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= there:
        raise ValueError(
            f"rank {os.environ['RANK']} is number {local} of its machine, which has {there} GPUs. Start as many ranks "
            "on a machine as it has GPUs (torchrun --nproc-per-node), or give --device cpu."
        )
    torch.cuda.set_device(local)


@contextmanager
def _ended_by_launcher(stopped: threading.Event) -> Iterator[None]:
    """A launcher ends the ranks that are left when one has died: as an error, so that what cleans up runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        if not stopped.is_set():
            stopped.set()
            raise RankFailed("the launcher ended this rank: another one died, or it was told to stop.")

    before = signal.signal(signal.SIGTERM, end)
    yield
    signal.signal(signal.SIGTERM, before)  # and not after a failure, which is still to be told


def _of_all(error: BaseException, stopped: bool) -> BaseException:
    """The error as this rank tells it: as it is, or, where another rank has told, as `RankFailed`."""
    if not isinstance(error, Exception):
        return error
    place, count = distributed.get_rank(), ranks.total()
    lost = stopped or isinstance(error, RankFailed) or (isinstance(error, RuntimeError) and _LOST.search(str(error)))
    if not _first_to_tell():
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PATIENCE_S)
        return RankFailed("another rank of this run has failed, and said why.")
    if lost:
        error = RuntimeError(f"another rank of this run has ended without a word (killed, or out of RAM?). {AGAIN}")
    error.add_note(f"rank {place} of {count}")
    return error


def _leave_together() -> None:
    """Wait for all ranks, and let none close its connections while another still reads from them: to that one it would
    be a rank that has died, after a run that has ended well."""
    ranks.wait()
    key, until = f"ended/{next(_ends)}", time.monotonic() + PATIENCE_S
    here = _count(key, 1)
    while here is not None and here < ranks.total() and time.monotonic() < until:
        time.sleep(0.01)
        here = _count(key, 0)


def _first_to_tell() -> bool:
    """Is this the first rank to tell of a failure? Where nobody can be asked: yes."""
    return _count("told", 1) in (None, 1)


def _count(what: str, add: int) -> int | None:
    """A number that all ranks add to, after this rank has; None where whoever holds it is gone."""
    key = f"sparsetrain/{what}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        return int(distributed.distributed_c10d._get_default_store().add(key, add))
    except Exception:
        return None


@contextmanager
def claimed_once(recipe: RunRecipe, choice: Mapping[str, Any] | None) -> Iterator[None]:
    """Hold the output folder of a run, by the first rank for all of them; errors as of `claimed`."""
    with ExitStack() as held:
        ranks.by_first(lambda: _enter(held, recipe, choice))
        yield


def _enter(held: ExitStack, recipe: RunRecipe, choice: Mapping[str, Any] | None) -> None:
    held.enter_context(claimed(recipe.output, recipe, choice=choice))


def shared_step(recipe: RunRecipe) -> tuple[int, int]:
    """(rows in a pass, passes in a step) of one rank, so that all together read the recipe's rows of a step.

    Passes are shared first: they stay as they are then, and so does what a method computes of one.

    Raises:
        ValueError: the ranks can't have equal parts.
    """
    count, rows = ranks.total(), recipe.batch_size * recipe.grad_accum
    for size in range(recipe.batch_size, 0, -1):
        if rows % (size * count) == 0:
            return size, rows // (size * count)
    fits = -(-rows // count) * count
    raise ValueError(
        f"a step reads batch_size={recipe.batch_size} x grad_accum={recipe.grad_accum} rows, and {count} ranks cannot "
        f"share {rows} equally. Give a multiple of {count}, such as grad_accum={fits} with batch_size=1."
    )


def check_same_model(model: nn.Module, handle: Handle | None) -> None:
    """Raise ValueError if the ranks have made different models of the same recipe.

    Each rank loads, converts and calibrates by itself, from the same seed and rows; that is as fast as one doing it
    for all, and leaves nothing behind that only one of them has.
    """
    if ranks.total() == 1:
        return
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    if handle is not None:
        tensors |= {f"{key} {name}": x for key, found in handle.state().items() for name, x in found.items()}
    ranks.check_same(
        "model after the conversion",
        repr([(name, tuple(x.shape), str(x.dtype), _bits(x)) for name, x in sorted(tensors.items())]),
        "The same seed gives the same model on equal machines: use one kind of GPU and one version of torch on all "
        "nodes, or set calibration_tokens=0.",
    )


def _bits(x: torch.Tensor) -> int:
    """Of a tensor's bits; not of their order, which no two conversions differ in alone."""
    return int(torch.hash_tensor(x.contiguous()).item()) if x.numel() else 0
