"""An average of the weights that are trained, which is what is evaluated, sampled from and saved in the end.

    w̄ ← d·w̄ + (1 − d)·w after each step,    d = min(decay, (1 + step) / (10 + step))

The last weights of a noisy training lie beside its mean; the ramp lets the first steps be forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsetrain.core import ranks
from sparsetrain.core.errors import CheckpointError
from sparsetrain.runs.layout import checkpoint_folder
from sparsetrain.surgery.apply import Handle

FILE = "average.safetensors"


class Average(TrainerCallback):
    """Keeps the average, in fp32, and puts it into each checkpoint.

    A parameter that gets another shape (entries that are dropped, a model that has grown) begins anew.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {}
        self.handle: Handle | None = None

    def begin(self, model: Any, handle: Handle | None, left: Path | None) -> None:
        """Start from the weights of a model, or go on from a checkpoint.

        Raises:
            CheckpointError: the checkpoint has no average, or one of another model.
        """
        self.handle = handle
        self.weights = {name: _fp32(p) for name, p in _trained(model)}
        if left is None:
            return
        if not (left / FILE).is_file():
            raise CheckpointError(f"{left} has no {FILE}, which ema_decay={self.decay:g} goes on from. Start again.")
        found = load_file(str(left / FILE), device=str(next(model.parameters()).device))
        if found.keys() != self.weights.keys():
            raise CheckpointError(f"{left / FILE} is of another model than this run's. Start again.")
        self.weights = found

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = state.global_step
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, p in _trained(kwargs["model"]):
                kept = self.weights.get(name)
                if kept is None or kept.shape != p.shape:
                    self.weights[name] = _fp32(p)
                else:
                    kept.lerp_(p.detach().float(), share)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if ranks.is_first():
            save_file(self.weights, str(checkpoint_folder(args.output_dir, state.global_step) / FILE))

    def take(self, model: Any) -> None:
        """Give a model the average in place of its weights."""
        with torch.no_grad():
            for name, p in _trained(model):
                if name in self.weights and self.weights[name].shape == p.shape:
                    p.copy_(self.weights[name])
        self._written()

    @contextmanager
    def taken(self, model: Any) -> Iterator[None]:
        """Inside, a model has the average."""
        own = {name: p.detach().clone() for name, p in _trained(model)}
        self.take(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in _trained(model):
                    p.copy_(own[name])
            self._written()

    def _written(self) -> None:
        if self.handle is not None:
            self.handle.updated()  # a method that keeps a copy of what it trains writes it there


def _trained(model: Any) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _fp32(p: Tensor) -> Tensor:
    return p.detach().float().clone().contiguous()
