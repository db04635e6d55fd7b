"""A run stops at the first number that is not finite, before anything of it is saved."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsetrain.core.errors import NotFinite
from sparsetrain.runs.checkpoints import last_good
from sparsetrain.runs.finite import is_finite
from sparsetrain.surgery.apply import Handle


class FiniteCallback(TrainerCallback):
    """Looks at each step's loss, gradient and auxiliary losses, and at what the step has made of the weights.

    Needs `logging_steps=1` and `logging_nan_inf_filter=False`; before the callbacks that record or save.
    """

    def __init__(self, handle: Handle | None) -> None:
        self.handle = handle

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if "loss" not in logs:
            return
        found = [("the loss", float(logs["loss"]))]
        for site, losses in auxiliary_losses(self.handle).items():
            found += [(f"the auxiliary loss {name} of {site}", value) for name, value in losses.items()]
        if logs.get("grad_norm") is not None:
            found.append(("the gradient's norm", float(logs["grad_norm"])))
        wrong = [f"{name} is {value}" for name, value in found if not math.isfinite(value)]
        if (name := not_finite_parameter(kwargs["model"])) is not None:
            wrong.append(f"parameter {name} is not finite")
        if wrong:
            raise NotFinite(
                f"{' and '.join(wrong[:3])} after step {state.global_step}: training has diverged. Lower --lr, add "
                f"--warmup-steps, or keep more (keep_ratio, num_active). {last_good(args.output_dir or '.')}"
            )


def not_finite_parameter(model: nn.Module) -> str | None:
    """The first trained parameter with an entry that is not finite; one look at all of them where there is none."""
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained or bool(torch.stack([_peak(tensor) for tensor in trained.values()]).isfinite().all()):
        return None
    return next((name for name, tensor in trained.items() if not is_finite(tensor)), None)


def _peak(tensor: Tensor) -> Tensor:
    """The largest absolute value; not a number if one is not."""
    if not tensor.numel():
        return torch.zeros((), device=tensor.device)
    return torch.linalg.vector_norm(tensor, torch.inf).float()


def auxiliary_losses(handle: Handle | None) -> dict[str, dict[str, float]]:
    """Of the last training forward: site -> name -> value."""
    if handle is None:
        return {}
    found = {
        edit.key: {name: value for name, value in module.stats().items() if name.endswith("loss")}
        for edit, module in handle.installed
    }
    return {site: losses for site, losses in found.items() if losses}
