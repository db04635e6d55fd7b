"""What one kind of run brings to what all runs share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback

from sparsetrain.hf.train.held_out import KnownQuality
from sparsetrain.hf.train.journal import Journal
from sparsetrain.hf.train.parts import Parts
from sparsetrain.hf.train.stages import Enter
from sparsetrain.planner.preview import StageForecast
from sparsetrain.runs.checkpoints import Checkpoint
from sparsetrain.runs.events import Report
from sparsetrain.runs.spans import ONE_STAGE
from sparsetrain.surgery.apply import Handle
from sparsetrain.surgery.method import Stage


@dataclass(frozen=True, kw_only=True)
class Job:
    """What differs between jobs.

    open_parts: (report) -> everything but the weights, checked against each other.
    build: (parts, journal, resumed, known dense quality) -> the converted model and its handle, None if dense: of the
        first stage, or of the one that `resumed` is in.
    about: (parts) -> entries of the sidecar.
    title: what is trained, in a line.
    saved: the folder, inside the output, of what was trained.
    arguments: further arguments of the Trainer.
    callbacks: further callbacks, called before ours.
    stages: what the run trains, one after the other.
    enter: makes the model of a later stage.
    samples: record what the trained model answers to held-out prompts.
    forecast: (parts) -> what each of several stages is planned to take.
    """

    open_parts: Callable[[Report], Parts]
    build: Callable[[Parts, Journal, Checkpoint | None, KnownQuality], tuple[Any, Handle | None]]
    about: Callable[[Parts], dict[str, Any]]
    title: str
    saved: str
    arguments: dict[str, Any] = field(default_factory=dict)
    callbacks: tuple[TrainerCallback, ...] = ()
    stages: tuple[Stage, ...] = ONE_STAGE
    enter: Enter | None = None
    samples: bool = False
    forecast: Callable[[Parts], list[StageForecast]] | None = None
