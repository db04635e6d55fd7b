"""Site: what an edit installs in a model, and what it can be asked. A method overrides what it has to say."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core.backend import Ran, watch_ops
from sparsetrain.surgery.auxiliary import LossScale, attach_loss


def watching(ran: Ran) -> AbstractContextManager[Any]:
    """Inside, `ran` notes which backends run; compiled code is left alone."""
    return nullcontext() if torch.compiler.is_compiling() else watch_ops(ran)


class Site(nn.Module):
    """A module of ours in a converted model; nothing happens by default.

    Attributes:
        deploys_dense: the model will be used dense, so in evaluation mode it is dense already.
        held_dense: what `run_dense` was told last.
        adjusts_gradients: whether `adjust_gradients` has something to do now.
        adds_losses: the site calls `add_loss`.
        ran: the ops that `watching` saw, and the backends that ran them.
        learning_rate: of the step that the optimizer has just taken, as `updated` is called; None where nobody said.
    """

    adds_losses: bool = False

    deploys_dense: bool = False
    adjusts_gradients: bool = False
    held_dense: bool = False
    learning_rate: float | None = None

    def __init__(self) -> None:
        super().__init__()
        self.loss_scale = LossScale()
        self.ran: Ran = {}

    def add_loss(self, y: Tensor, loss: Tensor, weight: float) -> Tensor:
        """y, with a loss of the method's own added to the task's, scaled as that is (`surgery.auxiliary`)."""
        assert self.adds_losses, f"{type(self).__name__}.adds_losses says that it has no loss of its own"
        return attach_loss(y, loss, weight, self.loss_scale.factor)

    def watching(self) -> AbstractContextManager[Any]:
        """Inside, `ran` notes who runs the site's ops."""
        return watching(self.ran)

    @property
    def runs_dense(self) -> bool:
        """Compute what the dense model computes: inside `handle.dense()`, in a dense phase, or as deployed."""
        return self.held_dense or (self.deploys_dense and not self.training)

    def set_step(self, step: int, total_steps: int | None) -> None:
        """Follow the training step: a pure function of its arguments.

        Args:
            step: optimizer steps done so far.
            total_steps: length of the run, if it is known.
        """

    def settle(self) -> None:
        """Make the site ready to be evaluated as it is now: past warm-ups."""
        self.set_step(1, 1)

    def derive(self) -> None:
        """Make anew what follows from the weights (packed copies), after they changed outside the optimizer."""

    def check_adapters(self, owner: nn.Module) -> None:
        """Raise ValueError if the owner carries an adapter that the site would compute wrongly, before it trains.

        Args:
            owner: the module at the edit's site.
        """

    def run_dense(self, dense: bool) -> None:
        """Compute what the dense model computes, or what the method does."""
        self.held_dense = dense

    def adjust_gradients(self) -> None:
        """Change gradients that are unscaled and clipped, before the optimizer's step."""

    def updated(self) -> None:
        """The optimizer has taken its step."""

    def tensors(self) -> dict[str, Tensor]:
        """What must be stored beside the dense weights to rebuild this site."""
        return {}

    @torch.no_grad()
    def take(self, owner: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Become the site that `tensors()` described when the weights that are now in the model were saved.

        Args:
            owner: the module at the edit's site.

        Raises:
            KeyError, RuntimeError, ValueError: they are of another site.
        """
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        if odd := sorted(tensors.keys() ^ self.tensors().keys() | tensors.keys() - own.keys()):
            raise ValueError(f"{type(self).__name__} has no {odd[0]!r}, or does not know how to take it")
        for name, tensor in tensors.items():
            own[name].copy_(tensor)

    def dense_weights(self) -> dict[str, Tensor] | None:
        """Weights that the site stands for, where the model's own are not what is computed with: by name, relative to
        the edit's site. A saved model holds them, so that it loads plainly."""
        return None

    def held_models(self) -> list[nn.Module]:
        """Whole models that the site runs beside the converted one, and that are no children of it (a teacher)."""
        return []

    def held_tensors(self) -> list[Tensor]:
        """What is kept from step to step that is neither parameter nor buffer."""
        return [tensor for model in self.held_models() for tensor in (*model.parameters(), *model.buffers())]

    def undecayed(self) -> list[nn.Parameter]:
        """Parameters of the site that weight decay would spoil."""
        return []

    def stats(self) -> dict[str, float]:
        """Numbers for the report (auxiliary losses, loads), from the last forward."""
        return {}

    def notes(self) -> list[str]:
        """What a user should know about this site on this machine."""
        return []

    def refuses(self, arguments: Any) -> str | None:
        """Why the site cannot be trained with a trainer's arguments, or None."""
        return None

    def trained_with(self, arguments: Any) -> None:
        """A trainer with these arguments begins to train."""

    def merge_error(self) -> str | None:
        """Why the site cannot become dense again with the same outputs, or None."""
        return None


def notes_of(installed: list[tuple[str, Site]]) -> list[str]:
    """What sites say, given beside their methods' names, each once; then, by method, who ran its operations."""
    ran: dict[str, Ran] = {}
    for method, site in installed:
        for op, names in site.ran.items():
            ran.setdefault(method, {}).setdefault(op, set()).update(names)
    said = [note for _, site in installed for note in site.notes()]
    for method, ops in ran.items():
        parts = [f"{op.replace('_', ' ')} on {' and '.join(sorted(names))}" for op, names in sorted(ops.items())]
        said.append(f"{method}: ran {', '.join(parts)}.")
    return list(dict.fromkeys(said))
