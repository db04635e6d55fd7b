"""sparsify(): apply a recipe to a model in place, all edits or none, and hand back the way to undo it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import Undo, describe
from sparsetrain.core.config import MethodConfig
from sparsetrain.surgery.plan import Plan, Schedule, State, method_of, plan
from sparsetrain.surgery.support import check_support, features_of

Progress = Callable[[str, float], None]


@runtime_checkable
class Scheduled(Protocol):
    """An installed module whose behaviour follows the training step.

    set_step: (step, total steps or None, scale of auxiliary losses). A pure function of its arguments.
    tensors: what must be stored beside the dense weights to rebuild this site.
    stats: numbers for the report (auxiliary losses, loads), from the last forward.
    merge_error: why the site cannot become dense again with the same outputs, or None.

    A module may have more: `settle()` makes it ready to be evaluated as it is now (without it: a step past warm-ups),
    `adjust_gradients()` changes clipped gradients and `adjusts_gradients` says whether it will, `notes()` says what a
    user should know.
    """

    def set_step(self, step: int, total_steps: int | None, loss_scale: float) -> None: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def stats(self) -> dict[str, float]: ...
    def merge_error(self) -> str | None: ...


@dataclass
class Handle:
    """A converted model's way back and its controls.

    Attributes:
        model: the model that was converted (the same object, changed in place).
        plan: what was planned and done.
        modules_to_save: names for PEFT's `LoraConfig(modules_to_save=...)`; without them PEFT freezes what we added.
    """

    model: nn.Module
    plan: Plan
    _undos: list[Undo] = field(default_factory=list, repr=False)
    _installed: dict[str, Scheduled] = field(default_factory=dict, repr=False)
    _schedules: list[Schedule] = field(default_factory=list, repr=False)

    @property
    def configs(self) -> tuple[MethodConfig, ...]:
        return self.plan.configs

    @property
    def modules_to_save(self) -> list[str]:
        names = [name for config in self.configs for name in method_of(config).modules_to_save]
        return list(dict.fromkeys(names))

    @property
    def active(self) -> bool:
        """False once `restore` or `merge` has made the model dense again."""
        return bool(self._undos)

    @property
    def restart_step(self) -> int | None:
        """The step from which a method wants the learning-rate schedule to count anew, or None."""
        return max((at for s in self._schedules if (at := s.restart_step) is not None), default=None)

    def step(self, step: int, total_steps: int | None = None, loss_scale: float = 1.0) -> list[str]:
        """Drive every schedule: call before each optimizer step. Returns a line for each thing that changed for good.

        Args:
            step: optimizer steps done so far.
            total_steps: length of the run, for phases given as a share of it.
            loss_scale: factor on auxiliary losses, 1 / gradient accumulation steps.
        """
        for module in self._installed.values():
            module.set_step(step, total_steps, loss_scale)
        return [line for schedule in self._schedules for line in schedule.advance(step, total_steps)]

    def settle(self) -> None:
        """Make the model ready for evaluation: past warm-ups, weights as they are. `step` goes on as before."""
        for module in self._installed.values():
            if hasattr(module, "settle"):
                module.settle()  # type: ignore[attr-defined]
            else:
                module.set_step(1, 1, 1.0)

    @property
    def adjusts_gradients(self) -> bool:
        """Whether a method has something to add to the gradients."""
        return any(getattr(module, "adjusts_gradients", False) for module in self._installed.values())

    def adjust_gradients(self) -> None:
        """What methods add to gradients; call it after unscaling and clipping, before `optimizer.step()`."""
        for module in self._installed.values():
            if getattr(module, "adjusts_gradients", False):
                module.adjust_gradients()  # type: ignore[attr-defined]

    def notes(self) -> list[str]:
        """What a user should know about this model on this machine, each once."""
        said = [note for module in self._installed.values() for note in getattr(module, "notes", list)()]
        return list(dict.fromkeys(said))

    def state(self) -> State:
        """`edit.key` -> tensors that rebuild the site beside the dense weights; feed it to `sparsify(state=...)`."""
        return {site: module.tensors() for site, module in self._installed.items()}

    def report(self) -> dict[str, Any]:
        """What was changed and how it behaves: planned costs, and the last forward's statistics by site."""
        stats = {site: module.stats() for site, module in self._installed.items()}
        return {
            "model_class": self.plan.model_class,
            "family": self.plan.family,
            "configs": [config.to_dict() for config in self.configs],
            "edits": self.plan.rows(),
            "stats": {site: values for site, values in stats.items() if values},
            "notes": self.notes(),
        }

    def restore(self) -> None:
        """Make the model what it was, bit for bit: same modules, parameters and order of weights."""
        while self._undos:
            self._undos.pop()()
        self._installed.clear()
        self._schedules.clear()

    def merge(self) -> nn.Module:
        """Return to the dense class where that changes no output; refuse otherwise, changing nothing.

        Raises:
            ValueError: a site cannot be dense with the same outputs (routing or key selection drops something).
        """
        for site, module in self._installed.items():
            reason = module.merge_error()
            if reason:
                raise ValueError(
                    f"{site} cannot be merged into a dense model: {reason}. Export the sparse model "
                    "(dense weights beside sparsity_config.json), or call restore() to drop the sparsity."
                )
        self.restore()
        return self.model


def sparsify(
    model: nn.Module,
    *configs: MethodConfig,
    calibration: Iterable[dict[str, Tensor]] | None = None,
    state: State | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Handle:
    """Apply a recipe to `model` in place; the model keeps its class, so Trainer, PEFT and save_pretrained work on.

    Args:
        model: the model; convert it before PEFT wraps it.
        configs: the recipe.
        calibration: batches (keyword arguments of the model's forward) that methods with a learned start need: a few
            thousand tokens of the kind the model will be trained on.
        state: tensors of an earlier conversion (`handle.state()` or a sidecar file) instead of calibrating.
        seed: seeds everything drawn here; the same seed gives the same model.
        progress: called with (what is being done, share done in [0, 1]).

    Raises:
        PlanError, UnknownFamily, ValueError: as `plan`. The model is unchanged then.
    """
    planned = plan(model, *configs)
    check_support(configs, describe(model), features_of(model))
    batches = None if calibration is None else list(calibration)
    rng = torch.random.get_rng_state()
    handle = Handle(model, planned)
    try:
        torch.manual_seed(seed)
        tensors = state if state is not None else _prepare(model, planned, batches, progress or (lambda *_: None))
        for edit in planned.edits:
            undo, module = edit.install(model, tensors.get(edit.key, {}))
            handle._undos.append(undo)
            if module is not None:
                assert isinstance(module, Scheduled)
                handle._installed[edit.key] = module
        for config in configs:
            if (schedule := method_of(config).schedule) is not None:
                sites = [handle._installed[edit.key] for edit in planned.edits if edit.config is config]
                handle._schedules.append(schedule(model, config, sites))
    except BaseException:
        handle.restore()
        raise
    finally:
        torch.random.set_rng_state(rng)
    handle.step(0)
    return handle


def _prepare(model: nn.Module, planned: Plan, batches: list[dict[str, Tensor]] | None, progress: Progress) -> State:
    found: State = {}
    for config in planned.configs:
        method = method_of(config)
        edits = [edit for edit in planned.edits if edit.config is config]
        if method.prepare is not None:
            found.update(method.prepare(model, edits, batches or [], progress))
    return found
