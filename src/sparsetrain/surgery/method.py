"""Method: everything that the rest of the house may ask of a method, registered by the method's own folder.

A method's config becomes edits (or, for a growth method, new models). Whatever else a run, a planner or an export has
to know of it, it asks here, so that no code above `methods` names one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, Undo
from sparsetrain.core.config import MethodConfig
from sparsetrain.core.cost import Cost
from sparsetrain.core.explanation import Explanation
from sparsetrain.core.pictures import Gallery
from sparsetrain.surgery.site import Site

QUANTISED = ("four_bit", "eight_bit")
"""Features that a method which reads weights itself lacks together."""
State = dict[str, dict[str, Tensor]]
"""`edit.key` -> tensor name -> tensor: what calibration found, or what a sidecar file holds."""
Batch = dict[str, Tensor]
Read = Callable[[Sequence[str]], Batch]
"""Texts -> a batch of them, as the model takes it."""
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
    labelled: a row has one label, and no label a token. one_sequence: a row is one sequence of tokens.
    reads_texts: the model takes a text as it takes a row, or in the place of one.
    lengths, eval_lengths: give the tokens of every sequence of the training rows and of the held-out ones; None before
        rows are read, and for rows that are no sequences.
    """

    task: str
    seq_len: int
    labelled: bool = False
    one_sequence: bool = True
    reads_texts: bool = True
    lengths: Callable[[], Sequence[int]] | None = None
    eval_lengths: Callable[[], Sequence[int]] | None = None


@dataclass(frozen=True)
class Origin:
    """Where a parameter of a new model comes from, its weights as its optimizer state.

    old: name of the old parameter; several names where `map` makes one of them (layers that are averaged).
    fill: without `map`, old entries fill the leading corner of the new parameter; the rest of its weights is this, or
        the new model's own values for None, and the rest of its optimizer state is 0.
    map: (old tensor, ...) -> the new parameter's tensor, on whichever device they are. Adam's moments are mapped by it
        too, so it shall be linear, with weights that are not negative, or `carry` False.
    carry: whether the optimizer state comes along; False: it starts anew.
    parts: (dimension, number of equal parts) of a fused parameter: without `map`, each part fills its own corner.
    """

    old: str | tuple[str, ...]
    fill: float | None = 0.0
    map: Callable[..., Tensor] | None = None
    carry: bool = True
    parts: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        assert self.map is not None or isinstance(self.old, str), "several old parameters need a map"

    @property
    def olds(self) -> tuple[str, ...]:
        return (self.old,) if isinstance(self.old, str) else self.old


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run that trains one model.

    share: of the run's steps; the shares of a run add up to 1.
    restart_lr: the learning rate warms up and falls anew over this stage's steps, rather than go on with the run's.
    warmup_steps: how long it then warms up; None: as long as the run's.
    lr_ratio: learning rate of this stage over the run's.
    rewind_lr: the run's own schedule goes back to the end of its warm-up, and on from there through later stages.
    """

    name: str
    share: float
    restart_lr: bool = False
    warmup_steps: int | None = None
    lr_ratio: float = 1.0
    rewind_lr: bool = False


def stage_end(stages: Sequence[Stage], index: int, total_steps: int) -> int:
    """Optimizer steps that a run of that length has done when a stage of it ends; 0 for the stage before the first."""
    return round(total_steps * sum(stage.share for stage in stages[: index + 1]))


Weights = dict[str, Tensor]
"""Name of a parameter -> its values."""


@dataclass(frozen=True, kw_only=True)
class Grown:
    """The model that a stage trains.

    model: a new model (the old one is left as it is), or the very model that was given, to go on with it.
    origins: name of each new parameter -> where it comes from; one without keeps its own values and starts without
        optimizer state. Not read for the model that was given.
    optimizer: `carry` takes the optimizer's state along as `origins` say; `fresh` starts without.
    edits: configs that are applied to the model for this stage, before the recipe's own, and undone as it ends.
    """

    model: nn.Module
    origins: Mapping[str, Origin] = field(default_factory=dict)
    optimizer: Literal["carry", "fresh"] = "carry"
    edits: tuple[MethodConfig, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How a growth method makes the models of a run, each out of the one before.

    A run that goes on from a checkpoint inside stage i rebuilds that stage's model by `enter` for stages 0 to i,
    without the training between, and then loads weights. So what `enter` makes (modules, shapes, names) must follow
    from config, stage and the shapes of the model it is given; only values may follow from values. It may run on the
    meta device. New weights may be drawn from torch's generator: a run seeds it before each call, by its seed and the
    stage. A stage that was interrupted as it began is entered again, and must come out the same.

    stages: config -> the stages of a run, in order.
    enter: (config, index of a stage, model as it stands, its anatomy, kept weights) -> the model that the stage trains.
        Stage 0 is given the recipe's own model, freshly made. `kept` holds weights by a name that the method chooses,
        from one stage for a later one; what is read from it is on the CPU.
    with_small_share: (config, share of the run's steps) -> the config whose smaller models train for that share, or for
        as much of it as leaves every stage its least. None: it has no such option.
    """

    stages: Callable[[Any], tuple[Stage, ...]]
    enter: Callable[[Any, int, nn.Module, Anatomy, MutableMapping[str, Weights]], Grown]
    with_small_share: Callable[[Any, float], Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a method meets a model, and what is asked of it around that.

    A method has either edits and site names, or a growth.

    edits: (config, anatomy, model) -> edits; pure. Raises ValueError when a size does not fit.
    site_names: anatomy -> all sites the method could take, for the error when nothing matches.
    growth: how it makes the models of a run.
    prepare: (model, edits, calibration batches, progress) -> tensors for each site; None when nothing is to be found.
    modules_to_save: names of child modules with parameters of our own, for PEFT's list of that name.
    trains: (config, anatomy, modules that the model had no weights for) -> modules of the model itself that train
        beside what the method adds. Asked of a config that `trains_own`; else LoRA or all weights train.
    schedule: (model, config, its installed modules) -> what changes them together in training, if anything does.
    limits: feature (of `surgery.support`) or family -> why the method cannot; what is not named is claimed and tested.
    refuse: (config, facts of the rows) -> why it cannot train on such rows, or None. Asked before and after reading.
    reads_longest: config -> whether calibration must see the longest rows (a pattern reaches as far as they do).
    after_adapter: (model with its adapter, batches, steps, lr, progress): a stage between conversion and training.
    exports: format -> (handle) -> the plain model with what was trained written into its weights.
    merge_adapter_error: (config, linears of one edit that carry LoRA) -> why folding it in would change outputs.
    learning_rate: (config, its installed modules) -> what suits what they train, for a recipe that gives none.
    leave: (handle, folder of a finished run): files that it leaves there, beside what is saved; says which.
    measure: (handle, model, batch, `measure.memory.saved_activations`) -> lines for the report, when training begins.
    texts: config -> what the model has to read before it is changed: `prepare` is given these batches first.
    explain: (handle, model, batch, a name for each row, names of the labels) -> why each row was decided as it was.
    pictures: the method's part of a saved state, by site -> pictures for the report; None: nothing to show (yet).
    """

    edits: Callable[[Any, Anatomy, nn.Module], list[Edit]] | None = None
    site_names: Callable[[Anatomy], list[str]] = lambda _anatomy: []
    growth: Growth | None = None
    prepare: Callable[[nn.Module, list[Edit], list[Batch], Progress], State] | None = None
    modules_to_save: tuple[str, ...] = ()
    trains: Callable[[Any, Anatomy, list[str]], list[str]] = lambda _config, _anatomy, new: new
    schedule: Callable[[nn.Module, Any, list[Any]], Schedule] | None = None
    limits: Mapping[str, str] = field(default_factory=dict)
    refuse: Callable[[Any, RowFacts], str | None] = lambda _config, _facts: None
    reads_longest: Callable[[Any], bool] = lambda _config: False
    after_adapter: Callable[[nn.Module, Iterable[Batch], int, float, Progress], None] | None = None
    exports: Mapping[str, Callable[[Any], nn.Module]] = field(default_factory=dict)
    merge_adapter_error: Callable[[Any, list[str]], str | None] = lambda _config, _linears: None
    learning_rate: Callable[[Any, list[Any]], float] | None = None
    leave: Callable[[Any, Path], list[str]] | None = None
    measure: Callable[[Any, nn.Module, Batch, Callable[..., Any]], list[str]] | None = None
    texts: Callable[[Any], Sequence[str]] = lambda _config: ()
    explain: Callable[[Any, nn.Module, Batch, Sequence[str], Sequence[str]], list[Explanation]] | None = None
    pictures: Callable[[State], Gallery | None] | None = None

    def __post_init__(self) -> None:
        assert (self.edits is None) != (self.growth is None), "a method has edits or a growth"


_METHODS: dict[str, Method] = {}


def register_method(config: type[MethodConfig], method: Method) -> None:
    """Enter a method; called once by each method's `surgery` module."""
    assert (method.growth is not None) == config.grows, f"{config.method}: a config says whether its method grows"
    _METHODS[config.method] = method


def method_of(config: MethodConfig | type[MethodConfig]) -> Method:
    """The registered method of a config; its `surgery` module is imported when it is first asked for."""
    if config.method not in _METHODS:
        import_module(f"{config.__module__.rpartition('.')[0]}.surgery")
    return _METHODS[config.method]


def blank_state(edits: Iterable[Edit]) -> State:
    """A state that `sparsify` takes in place of calibration: the right tensors with no meaning."""
    return {edit.key: edit.blank() for edit in edits if edit.blank is not None}


def edits_of(configs: Iterable[MethodConfig]) -> tuple[MethodConfig, ...]:
    """The configs that change a model in place: those for `plan` and `sparsify`."""
    return tuple(config for config in configs if method_of(config).growth is None)


def growth_of(configs: Iterable[MethodConfig]) -> MethodConfig | None:
    """The config that makes the models of a run, if one does.

    Raises:
        ValueError: there are two.
    """
    found = [config for config in configs if method_of(config).growth is not None]
    if len(found) > 1:
        raise ValueError(
            f"{found[0].method!r} and {found[1].method!r} both make the models of a run, and a run has one sequence of "
            "them. Leave one out."
        )
    return found[0] if found else None
