"""plan(): which sites each config takes and what each costs, before anything is changed.

A method registers one `Method`: how its config becomes edits, and how those edits are prepared from calibration data.
An edit knows its site, what it claims, its cost, and how to install itself. Nothing here changes a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor, nn

from sparsetrain.core.anatomy import Anatomy, AttentionSite, Undo, describe
from sparsetrain.core.config import MethodConfig
from sparsetrain.core.cost import Cost
from sparsetrain.core.errors import PlanError

State = dict[str, dict[str, Tensor]]
"""`edit.key` -> tensor name -> tensor: what calibration found, or what a sidecar file holds."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One change at one site.

    claims: what the edit owns; two edits of one plan may not claim the same thing.
    cost: sequence length in tokens -> (dense cost, cost after), per token.
    install: (model, tensors of this site) -> undo. It leaves the model as it was if it raises.
    blank: the tensors that calibration would find, without their values, for a planner that has no data; None when the
        edit installs without any.
    controls: whether the installed module takes part in schedules; it is then found at `site`.
    """

    config: MethodConfig
    site: str
    layer: int
    claims: frozenset[str]
    cost: Callable[[int], tuple[Cost, Cost]]
    install: Callable[[nn.Module, dict[str, Tensor]], tuple[Undo, nn.Module | None]]
    note: str = ""
    blank: Callable[[], dict[str, Tensor]] | None = None

    @property
    def method(self) -> str:
        return self.config.method

    @property
    def key(self) -> str:
        """Names the edit in states and sidecar files; one site may carry edits of several methods."""
        return f"{self.site}:{self.method}"


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
class Method:
    """How a method meets a model.

    edits: (config, anatomy, model) -> edits; pure. Raises ValueError when a size does not fit.
    prepare: (model, edits, calibration batches, progress) -> tensors for each site; None when nothing is to be found.
    modules_to_save: names of child modules with parameters of our own, for PEFT's list of that name.
    site_names: anatomy -> all sites the method could take, for the error when nothing matches.
    schedule: (model, config, its installed modules) -> what changes them together in training, if anything does.
    limits: feature (of `surgery.support`) or family -> why the method cannot; what is not named is claimed and tested.
    """

    edits: Callable[[Any, Anatomy, nn.Module], list[Edit]]
    site_names: Callable[[Anatomy], list[str]]
    prepare: Callable[[nn.Module, list[Edit], list[dict[str, Tensor]], Callable[[str, float], None]], State] | None = (
        None
    )
    modules_to_save: tuple[str, ...] = ()
    schedule: Callable[[nn.Module, Any, list[Any]], Schedule] | None = None
    limits: Mapping[str, str] = field(default_factory=dict)


_METHODS: dict[str, Method] = {}


def register_method(config: type[MethodConfig], method: Method) -> None:
    """Enter a method; called once by each method's `surgery` module."""
    _METHODS[config.method] = method


def method_of(config: MethodConfig) -> Method:
    """The registered method of a config; its `surgery` module is imported when it is first asked for."""
    if config.method not in _METHODS:
        import_module(f"{config.__module__.rpartition('.')[0]}.surgery")
    return _METHODS[config.method]


def blank_state(edits: Iterable[Edit]) -> State:
    """A state that `sparsify` takes in place of calibration: the right tensors with no meaning."""
    return {edit.key: edit.blank() for edit in edits if edit.blank is not None}


@dataclass(frozen=True)
class Plan:
    """The edits of one recipe on one model. `print(plan)` shows them as a table."""

    model_class: str
    family: str
    configs: tuple[MethodConfig, ...]
    edits: tuple[Edit, ...]
    seq_tokens: int
    untouched: dict[str, int] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """One row an edit: site, method, forward MFLOP and saved elements per token, before and after."""
        rows = []
        for edit in self.edits:
            dense, sparse = edit.cost(self.seq_tokens)
            rows.append(
                {
                    "site": edit.site,
                    "method": edit.method,
                    "mflop_before": dense.flops / 1e6,
                    "mflop_after": sparse.flops / 1e6,
                    "saved_before": dense.saved_elements,
                    "saved_after": sparse.saved_elements,
                    "added_params": sparse.num_params - dense.num_params,
                    "note": edit.note,
                }
            )
        return rows

    def __str__(self) -> str:
        head = ("site", "method", "MFLOP/token", "saved numbers/token", "added params", "note")
        lines: list[tuple[str, ...]] = [head]
        for row in self.rows():
            lines.append(
                (
                    row["site"],
                    row["method"],
                    f"{row['mflop_before']:.3f} -> {row['mflop_after']:.3f}",
                    f"{row['saved_before']:.0f} -> {row['saved_after']:.0f}",
                    f"{row['added_params']:,}",
                    row["note"],
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        title = f"{self.model_class} ({self.family}), at {self.seq_tokens} tokens:"
        body = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
        left = [f"left dense by {m}: {n} of its sites" for m, n in self.untouched.items() if n]
        return "\n".join([title, *body, *left])


def plan(model: nn.Module, *configs: MethodConfig, seq_tokens: int = 2048) -> Plan:
    """Say which sites each config takes and what each costs, without changing the model.

    Args:
        model: a model that an anatomy adapter knows; its weights are not read, so it may live on the meta device.
        configs: the recipe, e.g. `PQAttention(keep_ratio=1/8), RoutedFFN(num_blocks=8, num_active=4)`.
        seq_tokens: the sequence length at which costs are printed.

    Raises:
        PlanError: a config matches nothing, or two claim one site; the message names both and lists the sites.
        UnknownFamily: no adapter knows the model.
        ValueError: a size does not fit (head width, FFN width, number of blocks).
    """
    if not configs:
        raise PlanError("plan() was given no config. Give at least one, e.g. RoutedFFN().")
    anatomy = describe(model)
    edits: list[Edit] = []
    untouched: dict[str, int] = {}
    for config in configs:
        method = method_of(config)
        new = method.edits(config, anatomy, model)
        sites = method.site_names(anatomy)
        if not new:
            raise PlanError(_no_match(config, anatomy, sites))
        untouched[config.method] = len(sites) - len(new)
        edits.extend(new)
    _refuse_double_claims(edits)
    return Plan(anatomy.model_class, anatomy.family, configs, tuple(edits), seq_tokens, untouched)


def refuse_dropout(method: str, site: AttentionSite) -> None:
    """Raise ValueError if the site drops attention weights: no sparse attention does."""
    if site.dropout > 0:
        raise ValueError(
            f"{method} cannot take {site.name}: attention dropout is {site.dropout}, and sparse attention has none. "
            "Load the model with attention dropout 0 (attention_dropout=0.0; BERT and ViT: "
            "attention_probs_dropout_prob=0.0; GPT-2: attn_pdrop=0.0)."
        )


def _no_match(config: MethodConfig, anatomy: Anatomy, sites: Iterable[str]) -> str:
    sites = list(sites)
    shown = ", ".join(sites[:3]) + (f", … {sites[-1]}" if len(sites) > 3 else "")
    return (
        f"{config.method!r} matches nothing in {anatomy.model_class} with targets={config.targets}, "
        f"layers={config.layers}, from_depth={config.from_depth}. "
        f"Its sites there ({len(sites)}): {shown or 'none'}. Widen `targets` or `layers`."
    )


def _refuse_double_claims(edits: list[Edit]) -> None:
    owner: dict[str, Edit] = {}
    for edit in edits:
        for claim in edit.claims:
            other = owner.setdefault(claim, edit)
            if other is not edit:
                raise PlanError(
                    f"{other.method!r} (targets={other.config.targets}) and {edit.method!r} "
                    f"(targets={edit.config.targets}) both claim {claim}. Narrow the `targets` or `layers` of one."
                )
