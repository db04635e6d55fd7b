"""What is found out before anything is edited: methods fit what they add on batches run through the dense model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core.modes import evaluating
from sparsetrain.surgery.method import Edit, Progress, Read, State, method_of
from sparsetrain.surgery.plan import Plan

TEXTS = 64
"""Texts in a batch."""


class _Enough(Exception):
    """The last block has run."""


@contextlib.contextmanager
def blocks_only(model: nn.Module, last: nn.Module) -> Iterator[Callable[[dict[str, Tensor]], None]]:
    """Yields a function that runs a batch through the model up to and with its block `last`: no later block, no head.

    In eval mode and without gradient. Hooks on `last` must be there before. The head alone is a fifth of a forward of
    SmolLM2-135M.
    """

    def stop(*_: Any) -> None:
        raise _Enough

    def run(batch: dict[str, Tensor]) -> None:
        with contextlib.suppress(_Enough), torch.no_grad():
            model(**batch)

    hook = last.register_forward_hook(stop)
    try:
        with evaluating(model):
            yield run
    finally:
        hook.remove()


def fitted(
    model: nn.Module,
    planned: Plan,
    batches: list[dict[str, Tensor]],
    progress: Progress | None,
    read: Read | None = None,
) -> State:
    """`edit.key` -> the tensors that each method of a plan starts from.

    Args:
        read: makes a batch of texts, which a method that asks for `texts` is given before the others.
    """
    found: State = {}
    for config in planned.configs:
        method = method_of(config)
        edits = [edit for edit in planned.edits if edit.config is config]
        if method.prepare is not None:
            texts = method.texts(config) if read is not None else ()
            own = [read(texts[i : i + TEXTS]) for i in range(0, len(texts), TEXTS)] if read is not None else []
            found.update(method.prepare(model, edits, own + batches, progress or (lambda *_: None)))
    return found


def told(edits: tuple[Edit, ...], progress: Progress | None) -> Iterator[Edit]:
    """The edits of a plan, as they are installed: one that takes a weight apart may take seconds."""
    for done, edit in enumerate(edits, 1):
        yield edit
        if progress is not None:
            progress("changing the model", done / len(edits))
