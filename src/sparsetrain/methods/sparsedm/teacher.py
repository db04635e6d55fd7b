"""The teacher: the model as training started, frozen, whose outputs the sparse one is drawn towards.

L = L_task + w · mean((ε_T − ε̂)²) (SparseDM, arXiv 2404.10445, section 3). It is no child of the model: no saver, no
optimizer and no average of weights sees it. A run that goes on converts its start anew, and has its teacher again.
"""

from __future__ import annotations

import inspect
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import Undo
from sparsetrain.core.units import bytes_text
from sparsetrain.surgery.fingerprint import fingerprint
from sparsetrain.surgery.outermost import declass_model, reclass_model

_CELL = "sparsedm_taught"
_OF_LOSS = frozenset({"labels", "num_items_in_batch", "shift_labels"})
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Teacher:
    """A frozen copy of a model, in evaluation mode.

    Attributes:
        model: the copy; None where a model was rebuilt from weights that were trained since.
        start: what the weights were, as one integer.
    """

    def __init__(self, model: nn.Module, dtype: str, start: Tensor | None = None) -> None:
        """Copy `model`, unless its weights are others than those of which `start` was made."""
        self.start = _start_of(model)
        self.dtype = _DTYPES.get(dtype)
        self.model: nn.Module | None = None
        if start is None or start.is_meta or self.start.is_meta or torch.equal(start.cpu(), self.start):
            self.model = deepcopy(model).requires_grad_(False).eval()
            if self.dtype is not None:
                self.model.to(self.dtype)
        else:
            self.start = start

    @torch.compiler.disable
    def difference(self, predicted: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """mean((ε_T − ε̂)²), in fp32, with the gradient of ε̂ alone.

        Args:
            predicted: ε̂, the student's output for the arguments.

        Raises:
            ValueError: the teacher's weights are not at hand, or its output has another shape.
        """
        if self.model is None:
            raise ValueError(
                "sparsedm: the teacher is the model as training started, and this one was rebuilt from weights that "
                "were trained since. Convert the start model and load the trained weights into it (a run that is "
                "resumed does), or set teacher_weight=0."
            )
        with torch.no_grad():
            target = prediction(self._run(args, kwargs), labelled=False)
        if target.shape != predicted.shape:
            raise ValueError(
                f"sparsedm: the teacher gives {tuple(target.shape)} and the student {tuple(predicted.shape)}. Distil "
                "between models of one shape, or set teacher_weight=0."
            )
        return nn.functional.mse_loss(predicted.float(), target.float())

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self.model is not None
        given = {name: value for name, value in kwargs.items() if name not in _OF_LOSS}
        if self.dtype is None:
            return self.model(*args, **given)
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, enabled=False):
            return self.model(*map(self._cast, args), **{name: self._cast(value) for name, value in given.items()})

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    def check_start(self, start: Tensor) -> None:
        """Raise ValueError if a saved run had another teacher."""
        if not (start.is_meta or self.start.is_meta) and not torch.equal(start.cpu(), self.start.cpu()):
            raise ValueError("its teacher was a model of other weights. Start from the model that the run started from")

    def apply(self, fn: Any) -> None:
        """Follow the model to another device; its own number format it keeps where one was asked for."""
        if self.model is not None:
            self.model._apply(fn)
            if self.dtype is not None:
                self.model.to(self.dtype)

    def notes(self, tensors: list[Tensor]) -> list[str]:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return [
            f"sparsedm: the model as training starts is the teacher: {bytes_text(size)} more, and a forward a step."
        ]


class Taught:
    """Mixed into a model whose outputs a teacher judges."""

    height = -1  # inside of what tells sites the scale of the model's loss

    def around(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Run `forward`; see `surgery.outermost`."""
        out = forward(*args, **kwargs)
        site = vars(self)[_CELL]
        # the site's mode: a denoiser inside of another model is no submodule of it, and is not told
        if not (site.training and torch.is_grad_enabled()) or site.runs_dense:
            return out
        weight = teacher_weight(site.config, self)  # type: ignore[arg-type]
        labelled = kwargs.get("labels") is not None
        loss = site.teacher.difference(prediction(out, labelled), args, kwargs)
        return _attached(out, labelled, lambda y: site.add_loss(y, loss, weight))


def prediction(out: Any, labelled: bool) -> Tensor:
    """The tensor of predictions in what a model's forward returned.

    Raises:
        ValueError: there is none.
    """
    if isinstance(out, tuple):
        out = {"sample": out[1 if labelled else 0]}
    found = next((out[name] for name in ("sample", "logits") if name in out and out[name] is not None), None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"sparsedm: a teacher compares predictions, and {type(out).__name__} has neither sample nor logits. Set "
            "teacher_weight=0."
        )
    return found


def _attached(out: Any, labelled: bool, attach: Any) -> Any:
    """The output with a loss attached: to the model's own where it has one, else to its predictions."""
    if isinstance(out, tuple):
        return (attach(out[0]), *out[1:])
    name = "loss" if labelled else next(name for name in ("sample", "logits") if name in out)
    out[name] = attach(out[name])
    return out


def teacher_weight(config: Any, model: nn.Module) -> float:
    """The weight in force: a model that takes labels has a loss of its own, and by default no teacher."""
    if config.teacher_weight is not None:
        return config.teacher_weight
    return 0.0 if "labels" in inspect.signature(type(model).forward).parameters else 0.1


def install_teacher(model: nn.Module, site: Any) -> Undo:
    """Let a model be taught by what it is now; `site` attaches the loss."""
    reclass_model(model, Taught)
    vars(model)[_CELL], site.adds_losses = site, True

    def undo() -> None:
        declass_model(model, Taught)
        del vars(model)[_CELL]

    return undo


def _start_of(model: nn.Module) -> Tensor:
    found = torch.zeros((), dtype=torch.int64)
    for parameter in model.parameters():
        found = found * 31 + fingerprint(parameter)
    return found
