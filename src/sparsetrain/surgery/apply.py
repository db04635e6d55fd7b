"""sparsify(): apply a recipe to a model in place, all edits or none, and hand back the way to undo it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, Undo, describe, library_model
from sparsetrain.core.config import MethodConfig
from sparsetrain.surgery.auxiliary import LossScale, scale_losses
from sparsetrain.surgery.calibration import fitted, told
from sparsetrain.surgery.checks import check_deploy, check_state, refuse_copies
from sparsetrain.surgery.deploy import Deploy, DeployDense
from sparsetrain.surgery.method import Edit, Progress, Read, Schedule, State, method_of
from sparsetrain.surgery.plan import Plan, plan
from sparsetrain.surgery.record import Record, attach
from sparsetrain.surgery.site import Site, notes_of
from sparsetrain.surgery.support import check_support, features_of
from sparsetrain.surgery.unattended import Unattended

CALLBACK = "sparsetrain.hf.train.callbacks:SparsityCallback"
"""What `handle.callback()` makes; it lives with transformers, and is imported when it is asked for."""


@dataclass
class Handle:
    """A converted model's way back and its controls.

    Attributes:
        model: the model that was converted (the same object, changed in place); of a `PeftModel`, the one inside.
        plan: what was planned and done.
        anatomy: the dense model's places.
        modules_to_save: names for PEFT's `LoraConfig(modules_to_save=...)`; without them PEFT freezes what we added.
        committed: `commit` has dropped the way back.
        deploy: how the model is trained that will be used dense; None: it will be used sparse, as it is trained.
        about: entries for the sidecar of whoever saves the model: `base_model`, `task`, ….
    """

    model: nn.Module
    plan: Plan
    anatomy: Anatomy
    committed: bool = False
    deploy: DeployDense | None = None
    about: dict[str, Any] = field(default_factory=dict)
    _undos: list[Undo] = field(default_factory=list, repr=False)
    _installed: list[tuple[Edit, Site]] = field(default_factory=list, repr=False)
    _schedules: list[Schedule] = field(default_factory=list, repr=False)
    _unattended: Unattended | None = field(default=None, repr=False)
    _driven: bool = field(default=True, repr=False)
    _loss_scale: LossScale = field(default_factory=LossScale, repr=False)

    @property
    def configs(self) -> tuple[MethodConfig, ...]:
        return self.plan.configs

    @property
    def deploys_dense(self) -> bool:
        """Is the product the dense model?"""
        return self.deploy is not None

    @property
    def trains_auxiliary(self) -> bool:
        """Whether what the methods added is trained, rather than left as it was fitted."""
        return self.deploy is None or self.deploy.train_auxiliary

    @property
    def modules_to_save(self) -> list[str]:
        names = [name for config in self.configs for name in method_of(config).modules_to_save]
        return list(dict.fromkeys(names)) if self.trains_auxiliary else []

    @property
    def active(self) -> bool:
        """False once `restore` or `merge` has made the model dense again."""
        return bool(self._undos) or self.committed

    @property
    def installed(self) -> tuple[tuple[Edit, Site], ...]:
        """Every edit that installed a module, with it, in the order of the plan."""
        return tuple(self._installed)

    def sites(self, method: str) -> dict[str, Any]:
        """Site name -> the module that a method installed there."""
        return {edit.site: module for edit, module in self._installed if edit.method == method}

    @property
    def restart_step(self) -> int | None:
        """The step from which a method wants the learning-rate schedule to count anew, or None."""
        return max((at for s in self._schedules if (at := s.restart_step) is not None), default=None)

    def step(self, step: int, total_steps: int | None = None, loss_scale: float | None = None) -> list[str]:
        """Drive every schedule: call before each optimizer step. Returns a line for each thing that changed for good.

        Args:
            step: optimizer steps done so far.
            total_steps: length of the run, for phases given as a share of it.
            loss_scale: factor on auxiliary losses. None: the gradient that arrives at the model's loss, so that they
                are scaled as it is, by accumulation and by a gradient scaler. A loss that is computed outside of the
                model, of its logits, brings none: then give 1 / gradient accumulation steps, times the scaler's scale.
        """
        if self._unattended is not None:
            self._unattended.attended()
        for edit in self.plan.edits if self._installed else ():
            refuse_copies(self.model, edit, self.modules_to_save)
        self._loss_scale.tell(loss_scale)
        if not self._driven and self.active:  # it may have been sharded since the conversion
            check_support(self.configs, self.anatomy, features_of(self.model))
            self._driven = True
        for edit, module in self._installed:
            if self.deploy is not None:
                module.run_dense(self.deploy.is_dense(edit.config, step, total_steps))
            module.set_step(step, total_steps)
        return [line for schedule in self._schedules for line in schedule.advance(step, total_steps)]

    def callback(self, **options: Any) -> Any:
        """A callback for transformers' Trainer, or any trainer built on it, that calls `step` and keeps the sidecar;
        options as of `sparsetrain.hf.train.callbacks.SparsityCallback`."""
        module, _, name = CALLBACK.partition(":")
        return getattr(import_module(module), name)(self, **options)

    def settle(self) -> None:
        """Make the model ready for evaluation: past warm-ups, weights as they are. `step` goes on as before."""
        for _, module in self._installed:
            module.settle()

    @contextmanager
    def dense(self) -> Iterator[nn.Module]:
        """Inside, the model computes what it computes without our methods, with its weights as they are now."""
        held = [(module, module.held_dense) for _, module in self._installed]
        try:
            for module, _ in held:
                module.run_dense(True)
            yield self.model
        finally:
            for module, before in held:
                module.run_dense(before)

    @property
    def adjusts_gradients(self) -> bool:
        """Whether a method has something to add to the gradients."""
        return any(module.adjusts_gradients for _, module in self._installed)

    def adjust_gradients(self) -> None:
        """What methods add to gradients; call it after unscaling and clipping, before `optimizer.step()`."""
        for module in [module for _, module in self._installed if module.adjusts_gradients]:
            module.adjust_gradients()

    def updated(self, learning_rate: float | None = None) -> None:
        """Tell the methods that weights have moved, and at which learning rate; call it after `optimizer.step()`."""
        for _, module in self._installed:
            module.learning_rate = learning_rate
            module.updated()

    def notes(self) -> list[str]:
        """What a user should know about this model on this machine, each once; and who has run the methods' ops."""
        return notes_of([(edit.method, module) for edit, module in self._installed])

    def state(self) -> State:
        """`edit.key` -> tensors that rebuild the site beside the dense weights; feed it to `sparsify(state=...)`."""
        return {edit.key: module.tensors() for edit, module in self._installed}

    def report(self) -> dict[str, Any]:
        """What was changed and how it behaves: planned costs, and the last forward's statistics by site."""
        stats = {edit.key: found for edit, module in self._installed if (found := module.stats())}
        return {
            "model_class": self.plan.model_class,
            "family": self.plan.family,
            "configs": [config.to_dict() for config in self.configs],
            "edits": self.plan.rows(),
            "stats": stats,
            "notes": self.notes(),
        }

    def commit(self) -> None:
        """Give up the way back: what only an undo would need, such as dense weights that were replaced, is freed."""
        self._undos.clear()
        self.committed = True

    def restore(self) -> None:
        """Make the model what it was, bit for bit: same modules, parameters and order of weights.

        Raises:
            ValueError: the way back was given up by `commit`.
        """
        if self.committed:
            raise ValueError(
                "restore() after commit(): what it needs was dropped. Load the dense model again, or export this one."
            )
        while self._undos:
            self._undos.pop()()
        self._installed.clear()
        self._schedules.clear()
        if self._unattended is not None:
            self._unattended.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        """That of a copy of the model, which has no way back: it would lead to the model that was copied."""
        memo[id(self)] = copied = object.__new__(Handle)
        vars(copied).update(deepcopy(vars(self) | {"_undos": []}, memo), committed=True)
        return copied

    def merge(self) -> nn.Module:
        """Return to the dense class where that changes no output; refuse otherwise, changing nothing.

        Raises:
            ValueError: a site cannot be dense with the same outputs (routing or key selection drops something).
        """
        for edit, module in self._installed:
            if reason := module.merge_error():
                raise ValueError(
                    f"{edit.key} cannot be merged into a dense model: {reason}. Export the sparse model "
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
    deploy: Deploy = "sparse",
    read: Read | None = None,
) -> Handle:
    """Apply a recipe to `model` in place; the model keeps its class, so Trainer, PEFT and save_pretrained work on.

    Args:
        model: the model, before PEFT wraps it or after. Wrapped before, PEFT's own files lack what we add: save such a
            model with our `save`, or the callback's sidecar beside it.
        configs: the recipe.
        calibration: batches (keyword arguments of the model's forward) that methods with a learned start need: a few
            thousand tokens of the kind the model will be trained on.
        state: tensors of an earlier conversion (`handle.state()` or a sidecar file) instead of calibrating.
        seed: seeds everything drawn here; the same seed gives the same model.
        progress: called with (what is being done, share done in [0, 1]).
        deploy: `sparse`: the trained model runs sparse, as it was trained. `dense`: it is trained sparse and used
            dense: evaluation mode is the dense model, and what is saved is plain. A `DeployDense` says how.
        read: makes a batch of texts, for methods that start from some (`Method.texts`).

    Raises:
        PlanError, UnknownFamily, ValueError: as `plan`; or the state is of another model or recipe. The model is
            unchanged then.
    """
    model = library_model(model)
    planned = plan(model, *configs)
    check_state(state or {}, planned)
    anatomy = describe(model)  # as it is dense: a site may not look like itself afterwards
    check_support(configs, anatomy, features_of(model))
    rng = torch.random.get_rng_state()
    handle = Handle(model, planned, anatomy, deploy=check_deploy(deploy, planned))
    try:
        torch.manual_seed(seed)
        tensors = state if state is not None else fitted(model, planned, list(calibration or ()), progress, read)
        _install(handle, tensors, progress)
    except BaseException:
        handle.restore()
        raise
    finally:
        torch.random.set_rng_state(rng)
    if handle.deploy is not None:
        handle.deploy.begin(handle.installed)
    _leave_record(handle)
    handle.step(0)
    handle._driven = False
    if handle._schedules or any(type(module).set_step is not Site.set_step for _, module in handle._installed):
        handle._unattended = Unattended(model, [config.method for config in configs])
    return handle


def _install(handle: Handle, tensors: State, progress: Progress | None) -> None:
    for edit in told(handle.plan.edits, progress):
        undo, module = edit.install(handle.model, tensors.get(edit.key, {}))
        handle._undos.append(undo)
        if module is not None:
            handle._installed.append((edit, module))
            module.loss_scale = handle._loss_scale
    if any(module.adds_losses for _, module in handle._installed):
        handle._undos.append(scale_losses(handle.model, handle._loss_scale))
    for config in handle.configs:
        if (schedule := method_of(config).schedule) is not None:
            own = [module for edit, module in handle._installed if edit.config is config]
            handle._schedules.append(schedule(handle.model, config, own))


def _leave_record(handle: Handle) -> None:
    """Let whoever saves or loads the model's weights find its conversion."""
    record = Record(handle.configs, handle._installed, handle.about, handle.deploys_dense, handle)
    handle._undos.append(attach(handle.model, record))
    if handle.anatomy.keep_record is not None:
        handle.anatomy.keep_record()
