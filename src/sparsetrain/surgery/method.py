"""Method: everything that the rest of the house may ask of a method, registered by the method's own folder.

A method's config becomes edits (or, for a growth method, new models). Whatever else a run, a planner or an export has
to know of it, it asks here, so that no code above `methods` names one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, Undo
from sparsetrain.core.config import MethodConfig
from sparsetrain.core.cost import Cost
from sparsetrain.core.pictures import Gallery
from sparsetrain.surgery.site import Site

State = dict[str, dict[str, Tensor]]
"""`edit.key` -> tensor name -> tensor: what calibration found, or what a sidecar file holds."""
Batch = dict[str, Tensor]
Progress = Callable[[str, float], None]
"""(what is being done, share done in [0, 1]) -> None."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One change at one site.

    claims: what the edit owns; two edits of one plan may not claim the same thing.
    cost: sequence length in tokens -> (dense cost, cost after), per token.
    install: (model, tensors of this site) -> undo, and the installed module if there is one. It leaves the model as it
        was if it raises.
    replaces: names of parameters that are in the model no more: the installed module's `dense_weights` stand for them.
    blank: the tensors that calibration would find, without their values, for a planner that has no data; None when the
        edit installs without any.
    """

    config: MethodConfig
    site: str
    layer: int
    claims: frozenset[str]
    cost: Callable[[int], tuple[Cost, Cost]]
    install: Callable[[nn.Module, dict[str, Tensor]], tuple[Undo, Site | None]]
    replaces: frozenset[str] = frozenset()
    note: str = ""
    blank: Callable[[], dict[str, Tensor]] | None = None

    @property
    def method(self) -> str:
        return self.config.method

    @property
    def key(self) -> str:
        """Names the edit in states and sidecar files; one site may carry edits of several methods."""
        return f"{self.site}:{self.method}"


def site_of(key: str, method: str) -> str | None:
    """The site that an `edit.key` names, if the edit is of that method."""
    site, _, owner = key.rpartition(":")
    return site if owner == method else None


class Schedule(Protocol):
    """What changes the sites of a config together, at a time that training decides.

    advance: called between optimizer steps; returns a line for each thing it did. It keeps what it knows in the sites'
        tensors, so that a rebuilt run goes on as it would have, and does nothing when called for a step again.
    restart_step: the step from which the learning-rate schedule shall count anew, or None.
    """

    @property
    def restart_step(self) -> int | None: ...
    def advance(self, step: int, total_steps: int | None) -> list[str]: ...


@dataclass(frozen=True, kw_only=True)
class RowFacts:
    """What a method may ask of the rows that a run is about to train on.

    task: as in the recipe. seq_len: tokens in a row at most.
    lengths, eval_lengths: give the tokens of every sequence of the training rows and of the held-out ones; None before
        rows are read, and for rows that are no sequences.
    """

    task: str
    seq_len: int
    lengths: Callable[[], Sequence[int]] | None = None
    eval_lengths: Callable[[], Sequence[int]] | None = None


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How a growth method makes a new model out of one.

    grow: (config, model, its anatomy) -> (new model, where its parameters come from; see `surgery.grow`).
    """

    grow: Callable[[Any, nn.Module, Anatomy], tuple[nn.Module, Any]]


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a method meets a model, and what is asked of it around that.

    A method has either edits and site names, or a growth.

    edits: (config, anatomy, model) -> edits; pure. Raises ValueError when a size does not fit.
    site_names: anatomy -> all sites the method could take, for the error when nothing matches.
    growth: how it makes a new model.
    prepare: (model, edits, calibration batches, progress) -> tensors for each site; None when nothing is to be found.
    modules_to_save: names of child modules with parameters of our own, for PEFT's list of that name.
    schedule: (model, config, its installed modules) -> what changes them together in training, if anything does.
    limits: feature (of `surgery.support`) or family -> why the method cannot; what is not named is claimed and tested.
    refuse: (config, facts of the rows) -> why it cannot train on such rows, or None. Asked before and after reading.
    reads_longest: config -> whether calibration must see the longest rows (a pattern reaches as far as they do).
    after_adapter: (model with its adapter, batches, steps, lr, progress): a stage between conversion and training.
    exports: format -> (handle) -> the plain model with what was trained written into its weights.
    merge_adapter_error: (config, linears of one edit that carry LoRA) -> why folding it in would change outputs.
    measure: (handle, model, batch, `measure.memory.saved_activations`) -> lines for the report, when training begins.
    pictures: the method's part of a saved state, by site -> pictures for the report; None: nothing to show (yet).
    """

    edits: Callable[[Any, Anatomy, nn.Module], list[Edit]] | None = None
    site_names: Callable[[Anatomy], list[str]] = lambda _anatomy: []
    growth: Growth | None = None
    prepare: Callable[[nn.Module, list[Edit], list[Batch], Progress], State] | None = None
    modules_to_save: tuple[str, ...] = ()
    schedule: Callable[[nn.Module, Any, list[Any]], Schedule] | None = None
    limits: Mapping[str, str] = field(default_factory=dict)
    refuse: Callable[[Any, RowFacts], str | None] = lambda _config, _facts: None
    reads_longest: Callable[[Any], bool] = lambda _config: False
    after_adapter: Callable[[nn.Module, Iterable[Batch], int, float, Progress], None] | None = None
    exports: Mapping[str, Callable[[Any], nn.Module]] = field(default_factory=dict)
    merge_adapter_error: Callable[[Any, list[str]], str | None] = lambda _config, _linears: None
    measure: Callable[[Any, nn.Module, Batch, Callable[..., Any]], list[str]] | None = None
    pictures: Callable[[State], Gallery | None] | None = None

    def __post_init__(self) -> None:
        assert (self.edits is None) != (self.growth is None), "a method has edits or a growth"


_METHODS: dict[str, Method] = {}


def register_method(config: type[MethodConfig], method: Method) -> None:
    """Enter a method; called once by each method's `surgery` module."""
    _METHODS[config.method] = method


def method_of(config: MethodConfig | type[MethodConfig]) -> Method:
    """The registered method of a config; its `surgery` module is imported when it is first asked for."""
    if config.method not in _METHODS:
        import_module(f"{config.__module__.rpartition('.')[0]}.surgery")
    return _METHODS[config.method]


def blank_state(edits: Iterable[Edit]) -> State:
    """A state that `sparsify` takes in place of calibration: the right tensors with no meaning."""
    return {edit.key: edit.blank() for edit in edits if edit.blank is not None}
