"""What the recipes of all jobs share: the keys of a training run, checked when the recipe is made, and its YAML file.

The keys equal the command line's flags. A fingerprint names what changes the training result, so that a run is never
resumed with another recipe unnoticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    Field,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from sparsetrain.core.config import MethodConfig, suggest, unknown
from sparsetrain.core.fields import shown
from sparsetrain.core.files import write_whole
from sparsetrain.core.quote import quoted
from sparsetrain.recipes import identity
from sparsetrain.recipes.data import DataRecipe
from sparsetrain.recipes.entries import read_methods, short_entry
from sparsetrain.recipes.passed import check_section, gathered, merged, short_keys
from sparsetrain.recipes.reading import read_mapping
from sparsetrain.recipes.tasks import offered, task_of
from sparsetrain.recipes.values import check_plain, problem_of

MOST = 2**24
"""Tokens in a sequence, and sequences or passes in a step, that no machine has trained with: a slip of the hand."""


class RunRecipe(DataRecipe):
    """The keys that every training run has; `Recipe` and `PretrainRecipe` add theirs."""

    job: ClassVar[str] = ""
    """What the command is called, and the key of its tasks in the table."""
    presets: ClassVar[Mapping[str, tuple[MethodConfig, ...]]] = {}
    default_preset: ClassVar[str | None] = None
    default_steps: ClassVar[int] = 200
    sections: ClassVar[tuple[str, ...]] = ("training",)
    """Keys that hold keys of other libraries."""

    seq_len: int = Field(1024, ge=8, le=MOST)
    """Tokens in a sequence: windows of packed text (lm), or where longer examples are cut. At most the model's
    context length."""
    batch_size: int = Field(1, ge=1, le=MOST)
    """Sequences in one forward and backward pass. Memory grows with it."""
    grad_accum: int = Field(1, ge=1, le=MOST)
    """Passes whose gradients are added before the weights move; the effective batch is batch_size x grad_accum."""
    steps: int | None = Field(None, ge=1, le=2**31 - 1)
    """Optimizer steps to train. Give this or epochs; 200 if neither is given."""
    epochs: float | None = Field(None, gt=0, le=1e6)
    """Passes over the training data, instead of steps."""
    lr: float | None = Field(gt=0, le=10)
    """Peak learning rate; None: what a method says of the converted model."""
    weight_decay: float = Field(0.0, ge=0, le=1)
    """AdamW's decoupled weight decay."""
    warmup_steps: int | float = Field(0, ge=0, le=2**31 - 1)
    """Steps in which the learning rate rises from 0 to lr; below 1: their share of all."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """How the learning rate falls after the warm-up: to 0 along a line or a half cosine, or not at all."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients longer than this are scaled down to it; 0 turns clipping off."""
    ema_decay: float | None = Field(None, ge=0, lt=1)
    """Decay of the average of the trained weights that is evaluated, sampled from and saved; 0: none is kept. Not
    given: 0.999 for diffusion, and else 0."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Keys of transformers' TrainingArguments that no key here stands for, such as label_smoothing_factor; optim,
    report_to and run_name may stand outside."""
    methods: tuple[MethodConfig, ...] = ()
    """Sparse methods, each {method: name, key: value}; on the command line name:key=value,key=value. An
    empty list: dense."""
    calibration_tokens: int = Field(8192, ge=0, le=2**40)
    """Training tokens from which the conversion learns (clusters, router, codebooks), spread over the data."""
    compare: Literal["none", "dense"] = "none"
    """dense: also train the strongest dense baseline beside, step by step in turns, and report both."""
    save_every: int = Field(50, ge=0, le=2**31 - 1)
    """Steps between checkpoints; 0 writes only the final model."""
    keep_checkpoints: int = Field(2, ge=2, le=2**31 - 1)
    """Newest checkpoints to keep. At least 2, so that one is whole while the next is being written."""
    eval_every: int = Field(0, ge=0, le=2**31 - 1)
    """Steps between evaluations; 0 evaluates only before and after training."""
    eval_tokens: int = Field(16384, ge=1, le=2**40)
    """Tokens of held-out data for each evaluation (rows with one label: as many as hold them)."""
    early_stopping: int = Field(0, ge=0, le=2**31 - 1)
    """Evaluations (see eval_every) in which the held-out loss, or metric_for_best_model, may fail to improve before a
    run ends; 0: it takes all its steps. The last weights are kept, unless load_best_model_at_end."""
    load_best_model_at_end: bool = False
    """End with the weights of the best evaluation (see eval_every) after training began. Each new best one is a
    checkpoint, and stays until there is a better one."""
    metric_for_best_model: str = "loss"
    """By what evaluations are compared: loss, or the metric of the task (accuracy, perplexity); eval_ may stand before
    it."""
    greater_is_better: bool | None = None
    """Its direction. Not given: as the metric has it."""
    gradient_checkpointing: Literal["none", "non-reentrant", "reentrant"] = "none"
    """Recompute activations in the backward pass: much less memory, about a third more time."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of activations, and of frozen weights. auto: bf16 where the device multiplies it 1.3 times as fast
    as fp32, else fp32; a run's own recipe.yaml says which."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seeds new weights, the conversion and the data order. Same seed and machine: same losses."""
    threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads; all cores if not given."""
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """auto, cpu, mps, cuda or cuda:N. auto takes a GPU if there is one."""
    resume: bool = False
    """Continue from the newest whole checkpoint in output."""

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, values: Any) -> Any:
        return cls._expanded(dict(values))

    @classmethod
    def _expanded(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The values with preset and defaults filled in."""
        known = [*cls.model_fields, *(["preset"] if cls.presets else []), *short_keys(cls.sections)]
        values = gathered(values, cls.sections)
        preset = values.pop("preset", None)
        for key in [*values, *(["preset"] if preset is not None else [])]:
            if key not in known:
                raise ValueError(unknown("key", key, sorted(known)))
        for key, value in values.items():
            check_plain(key, value, cls.model_fields[key].annotation)
        if values.get("methods") is None:
            values.pop("methods", None)
            preset = preset or cls.default_preset
        if preset is not None:
            if not isinstance(preset, str) or preset not in cls.presets:
                raise ValueError(unknown("preset", preset, cls.presets))
            if not isinstance(values.get("methods") or [], list | tuple):
                read_methods(values["methods"])
            values["methods"] = [*cls.presets[preset], *(values.get("methods") or [])]
        if values.get("steps") is None and values.get("epochs") is None:
            values["steps"] = cls.default_steps
        return values

    @field_validator("task", mode="plain")
    @classmethod
    def _offered(cls, task: Any) -> str:
        """A task of the table, to which packages add; the literals of the field's type are those that ship."""
        if task not in (known := offered(cls.job)):
            *most, last = map(repr, known)
            raise ValueError(f"task={shown(task)}: give {', '.join(most)} or {last}.{suggest(task, known)}")
        return task

    @field_serializer("task")
    def _plain(self, task: str) -> str:
        return task

    @field_validator("training", "lora", mode="before", check_fields=False)
    @classmethod
    def _passed(cls, given: Any, field: ValidationInfo) -> dict[str, Any]:
        return check_section(str(field.field_name), given, cls.model_fields)

    @field_validator("methods", mode="before")
    @classmethod
    def _read_methods(cls, given: Any) -> tuple[MethodConfig, ...]:
        return read_methods(given)

    @field_serializer("methods")
    def _write_methods(self, methods: tuple[MethodConfig, ...]) -> list[dict[str, Any]]:
        return [short_entry(config) for config in methods]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps={self.steps} and epochs={self.epochs} are both given. Give one of them.")
        if self.warmup_steps > 1 and self.warmup_steps != int(self.warmup_steps):
            raise ValueError(f"warmup_steps={self.warmup_steps:g}: give whole steps, or a share of them below 1.")
        if self.steps is not None and self.warmup_steps >= self.steps and self.warmup_steps > 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} leaves nothing of steps={self.steps}. Lower it.")
        return self

    @field_validator("metric_for_best_model")
    @classmethod
    def _bare(cls, metric: str) -> str:
        return metric.removeprefix("eval_")

    @model_validator(mode="after")
    def _watches(self) -> Self:
        """Those keys that go by evaluations in the run."""
        watching = f"early_stopping={self.early_stopping}" if self.early_stopping else "load_best_model_at_end"
        if not self.early_stopping and not self.load_best_model_at_end:
            for key in ("metric_for_best_model", "greater_is_better"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(
                        f"{key} is for load_best_model_at_end or early_stopping. Give one, or leave it out."
                    )
            return self
        if grows := [config.method for config in self.configs if config.grows]:
            raise ValueError(f"{watching}: {grows[0]} trains stages of a fixed length. Leave it out.")
        if not self.eval_every or self.compare != "none":
            needs = (
                "both sides of a comparison take the same steps, and keep their last weights. Leave one"
                if self.eval_every
                else "nothing is evaluated while it trains. Give eval_every (--eval-every) too, or leave it"
            )
            raise ValueError(f"{watching}: {needs} out.")
        if self.metric_for_best_model not in (known := ("loss", task_of(self.task).metric)):
            given = shown(self.metric_for_best_model)
            raise ValueError(
                f"metric_for_best_model={given} is not measured for task={self.task}. Give {' or '.join(known)}."
            )
        return self

    @property
    def trains_all(self) -> bool:
        """All weights are trained, rather than an adapter or what a method adds."""
        return True

    @property
    def trains_own(self) -> bool:
        """What a method adds is trained, and no weight of the model."""
        return any(config.trains_own for config in self.configs)

    @property
    def averages(self) -> float:
        """Decay of the average of the weights; 0: none is kept."""
        return task_of(self.task).average if self.ema_decay is None else self.ema_decay

    @property
    def configs(self) -> tuple[MethodConfig, ...]:
        """The methods as configs."""
        return self.methods

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Build a recipe from flags or file entries.

        Args:
            values: recipe keys, and `preset` (one of `PRESETS`), whose methods come before those of `methods`.

        Raises:
            ValueError: an unknown key (with the nearest known one), or a value out of range; one line a problem.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            problems: dict[str, list[str]] = {}
            for entry in error.errors():
                what, message = problem_of(entry)
                problems.setdefault(what, []).append(message)
            raise ValueError("\n".join(what + " or ".join(found) for what, found in problems.items())) from None

    @classmethod
    def from_yaml(cls, path: str | Path, changes: Mapping[str, Any] | None = None) -> Self:
        """Read a recipe file; `changes` (the command line) wins over the file.

        A change of steps or epochs replaces both, and one of preset or methods replaces both. One of a section
        (`training`, `lora`) replaces the keys that it names.

        Raises:
            ValueError: no such file, not YAML, not a mapping, or as `from_values`.
        """
        path = Path(path)
        try:
            values = read_mapping(path)
        except ValueError as error:
            name = quoted(str(path))
            why = str(error).removeprefix(f"{name} ").removeprefix("cannot be read: ").rstrip(".")
            raise ValueError(f"recipe {name} cannot be read: {why}.") from None
        for together in ({"steps", "epochs"}, {"preset", "methods"}):
            if together & set(changes or {}):
                values = {key: value for key, value in values.items() if key not in together}
        try:
            return cls.from_values(merged(values, changes or {}, cls.sections))
        except ValueError as error:
            raise ValueError(f"recipe {quoted(str(path))}: {error}") from None

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The recipe as YAML; written to `path` if given. `from_yaml` reads it back equal."""
        values = self.model_dump(exclude_none=True, exclude={"resume"})
        values = {key: value for key, value in values.items() if value or key not in self.sections}
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        if path is not None:
            write_whole(path, text)
        return text

    def training_values(self) -> dict[str, Any]:
        """The keys that change the training result, as JSON values."""
        return identity.training_values(self)

    def fingerprint(self) -> str:
        """A hash of `training_values`: equal for two recipes whose runs give the same model."""
        return hashlib.sha256(json.dumps(self.training_values(), sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, earlier: Mapping[str, Any]) -> list[str]:
        """Where `earlier` (another recipe's `training_values`) differs: 'lr: 0.0001 there, 0.0002 here', …"""
        return identity.differences(self.training_values(), earlier)
