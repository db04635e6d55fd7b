"""The held-out quality of a run's model, at whatever stage it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsetrain.core.errors import NotFinite
from sparsetrain.hf.train.assemble import autocasts
from sparsetrain.hf.train.evaluate import evaluate, held_out_tokens
from sparsetrain.hf.train.journal import Journal
from sparsetrain.hf.train.parts import Parts
from sparsetrain.runs.checkpoints import last_good
from sparsetrain.runs.quality import Quality
from sparsetrain.surgery.apply import Handle

KnownQuality = Quality | Callable[[], Quality | None] | None
"""The dense model's quality where another run has measured it; a function is asked when it is needed."""


def dense_start(known: KnownQuality, model: Any, parts: Parts, journal: Journal, name: str) -> Quality:
    """The dense model's quality: as known, or measured."""
    return (known() if callable(known) else known) or measure_quality(model, None, parts, journal, name)


def measure_quality(
    model: Any,
    handle: Handle | None,
    parts: Parts,
    journal: Journal | None = None,
    name: str = "evaluating",
    step: int | None = None,
) -> Quality:
    """The held-out quality; with a journal, its progress is told under `name`.

    Raises:
        NotFinite: it is not finite; says at which step, and what was written before.
    """
    if handle is not None:
        handle.settle()  # past any warm-up: the quality is that of the sparse model; training sets its own step
    assert parts.bundle.eval is not None
    try:
        return evaluate(
            model,
            parts.bundle.eval,
            parts.bundle.collate_fn,
            task=parts.recipe.task,
            batch_size=parts.recipe.batch_size,
            max_tokens=held_out_tokens(parts.recipe),
            autocast=autocasts(parts.recipe, parts.device),
            progress=None if journal is None else lambda share: journal.phase(name, share),
        )
    except NotFinite as error:
        when = "before training" if step is None else f"after step {step}"
        raise NotFinite(f"{name} {when}: {error} {last_good(parts.recipe.output)}") from None
