"""The layout of report.json: plain values, so a report can be read without this package.

Every number is in the unit of its name (`_s` seconds, `_bytes` bytes). A number that is not finite is stored as null.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

SCHEMA = 1
RUNS = ("dense", "sparse")
STAGES = ("dense", "untrained", "after_conversion", "after_distillation", "after_training")


class StepRecord(TypedDict):
    """One optimizer step. `wall_s` is cumulative training time, evaluation and saving excluded."""

    step: int
    loss: float | None
    step_time_s: float
    tokens: int
    wall_s: float


class EvalPoint(TypedDict):
    """The held-out loss after `step` steps and `wall_s` seconds of training; step 0 is before the first one.

    Beside it, the value of each metric under its name. `by_row`: `count`, `loss` and counted metrics -> each row's sum.
    """

    step: int
    wall_s: float
    loss: float | None
    perplexity: NotRequired[float | None]
    accuracy: NotRequired[float | None]
    by_row: NotRequired[dict[str, list[float]]]


class Sample(TypedDict):
    """What a trained model answers to a held-out prompt, beside what the data say; the prompt's end if it is long."""

    prompt: str
    reference: str
    completion: str


class ModelSize(TypedDict):
    """The size of a model; `flops_per_token` of a training step, as `measure.ledger` counts them."""

    parameters: int
    layers: int
    width: int
    flops_per_token: int


class StageRecord(ModelSize):
    """One stage of a run: the steps after `from_step`, up to `to_step`, train a model of that size."""

    name: str
    from_step: int
    to_step: int


class StageCost(TypedDict):
    """What a stage held, and what it was planned to take.

    static_bytes: parameters, buffers, gradients and optimizer state. saved_bytes: what a step kept for its backward.
    peak_bytes: allocated on a GPU at most. planned: static_bytes, saved_bytes, peak_bytes and time_s of the plan.
    """

    static_bytes: int
    saved_bytes: int
    peak_bytes: int | None
    planned: NotRequired[dict[str, float]]


class ImageQuality(TypedDict):
    """How far a model's images are from real ones (`measure.image_distance`).

    num, real: how many of each. steps: forwards that each of the model's took. features: whose, in words.
    """

    fid: float
    kid: float
    num: int
    real: int
    steps: int
    features: str


class Run(TypedDict):
    """One training run.

    setup_s: calibration, conversion and distillation before the first step; comparisons at equal time include it.
    metric: the quality that the task is judged by, of `core.metrics`; runs of earlier versions do not say it.
    perplexity, accuracy, or another metric: stage (one of `STAGES`) -> value on the held-out data.
    saved_activation_bytes: component -> bytes (`SavedActivations.by_component`).
    saved_by_layer: layer -> component -> bytes.
    static_bytes: `StaticMemory.to_dict()`.
    forward_time_s: component -> seconds of one forward.
    peak_rss_bytes: of a process that ran this run alone. resident_before: what it held before its weights were loaded.
    stages: where a run has more than one. stage_costs: of those that were trained, in their order.
    switch_s: seconds in which later stages began, of their first steps' `wall_s`.
    kept: name -> sha256 of weights that one stage kept for a later one.
    samples: of a language model in a comparison: the same prompts on both sides.
    pictures: file in the run's output -> what it shows. images: of a diffusion model.
    """

    steps: list[StepRecord]
    evals: NotRequired[list[EvalPoint]]
    setup_s: NotRequired[float]
    metric: NotRequired[str]
    perplexity: NotRequired[dict[str, float | None]]
    accuracy: NotRequired[dict[str, float | None]]
    saved_activation_bytes: NotRequired[dict[str, int]]
    saved_by_layer: NotRequired[dict[int, dict[str, int]]]
    static_bytes: NotRequired[dict[str, int]]
    forward_time_s: NotRequired[dict[str, float]]
    peak_rss_bytes: NotRequired[int | None]
    peak_gpu_bytes: NotRequired[int | None]
    resident_before: NotRequired[int | None]
    stages: NotRequired[list[StageRecord]]
    stage_costs: NotRequired[list[StageCost]]
    switch_s: NotRequired[float]
    kept: NotRequired[dict[str, str]]
    samples: NotRequired[list[Sample]]
    pictures: NotRequired[dict[str, str]]
    images: NotRequired[ImageQuality]


class Checkpointing(TypedDict):
    """Dense with gradient checkpointing, in a few steps beside dense.

    `time_ratio` is of its step to a dense step. Peaks are of both by then, each in a process of its own: a whole run
    meets longer rows and holds more, so these two beside each other say how much leaner it is.
    """

    time_ratio: float
    num_pairs: int
    peak_rss_bytes: int | None
    peak_gpu_bytes: int | None
    dense_rss_bytes: int | None
    dense_gpu_bytes: int | None


class Ledger(TypedDict):
    """FLOPs of two runs, all stages charged, and what the one with stages spent, over all that the dense one did, until
    its held-out loss was dense's last: null where it never was. `switch_share`: of its time, in changing models."""

    dense_flops: float
    sparse_flops: float
    target_loss: float | None
    flops_ratio: float | None
    time_ratio: float | None
    switch_share: float
    text: str


class Judgement(TypedDict):
    """Who won one quantity. `ratio` is sparse / dense; text is a full sentence with the numbers.

    low, high: the interval that decided, where there is one: of the speed-up for time, else of sparse - dense.
    checkpointing: the value of dense with checkpointing, where that was measured; the better of both is compared with.
    """

    quantity: str
    unit: str
    dense: float | None
    sparse: float | None
    ratio: float | None
    winner: Literal["sparse", "dense", "tie", "unknown"]
    text: str
    low: NotRequired[float | None]
    high: NotRequired[float | None]
    checkpointing: NotRequired[float | None]


class ShownGallery(TypedDict):
    """A section of pictures: its heading, and file, relative to the report -> what it shows."""

    heading: str
    files: dict[str, str]


class Report(TypedDict):
    """report.json. `timing` is `Ratio.to_dict()` of interleaved steps (dense is the baseline), where they were run.
    `galleries`: name -> the pictures of a method of the run."""

    schema: int
    created: str
    title: str
    headline: str
    advice: str
    judgements: list[Judgement]
    runs: dict[str, Run]
    recipe: dict[str, Any]
    machine: dict[str, Any]
    plan: list[dict[str, Any]]
    timing: dict[str, Any] | None
    checkpointing: NotRequired[Checkpointing | None]
    ledger: NotRequired[Ledger | None]
    galleries: NotRequired[dict[str, ShownGallery]]
    notes: list[str]
