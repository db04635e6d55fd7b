"""Several recipes traced at once: tracing is Python work, so it takes processes to use more than one core."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch

from sparsetrain.core.errors import UnknownFamily
from sparsetrain.hf.model.opening import make_config
from sparsetrain.hf.study.recipe_trace import outline
from sparsetrain.planner.model_config import ModelConfig
from sparsetrain.planner.outline import Outline
from sparsetrain.planner.predictor import Found
from sparsetrain.recipes.finetune import Recipe

MOST_PROCESSES = 4


def trace_all(
    recipes: list[Recipe], model: ModelConfig, *, bf16: bool, gpu: bool, here: bool
) -> Iterator[tuple[int, Found]]:
    """(index of the recipe, its outline or why it does not fit the model), as they get ready.

    What fails in another way is left out: tracing it again here shows the error.

    Args:
        recipes: of one model.
        model: its config.
        bf16, gpu, here: as `outline`.
    """
    workers = min(MOST_PROCESSES, _cores(), len(recipes))
    if workers < 2 or not _may_fork():
        return
    dearest_first = sorted(range(len(recipes)), key=lambda i: (-recipes[i].tiled_mlp, -len(recipes[i].configs)))
    # a forked process has the libraries already; importing them anew takes longer than a trace
    with ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=_begin) as pool:
        jobs = {pool.submit(_trace, recipes[i], model, bf16, gpu, here): i for i in dearest_first}
        for job in as_completed(jobs):
            try:
                found = job.result()
            except BrokenProcessPool:
                return
            if found is not None:
                yield jobs[job], Outline.from_json(found) if isinstance(found, str) else found


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent answers it
    torch.set_num_threads(1)  # the parent's threads are not here


def _trace(recipe: Recipe, model: ModelConfig, bf16: bool, gpu: bool, here: bool) -> str | ValueError | None:
    try:
        return outline(recipe, make_config(model.values, model.name), bf16=bf16, gpu=gpu, here=here).to_json()
    except ValueError as error:
        return (UnknownFamily if isinstance(error, UnknownFamily) else ValueError)(str(error))
    except Exception:
        return None


def _may_fork() -> bool:
    return sys.platform == "linux" and not torch.cuda.is_initialized()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
