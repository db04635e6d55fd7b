"""plan(): which sites each config takes and what each costs, before anything is changed.

An edit knows its site, what it claims, its cost, and how to install itself. Nothing here changes a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sparsetrain.core.anatomy import Anatomy, describe, library_model
from sparsetrain.core.config import MethodConfig
from sparsetrain.core.errors import PlanError
from sparsetrain.surgery.method import Edit, method_of


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
        model: a model that an anatomy adapter knows; its weights are not read, so it may live on the meta device. Sites
            and `targets` are named as in the library's own model, also when PEFT has wrapped it.
        configs: the recipe, e.g. `PQAttention(keep_ratio=1/8), RoutedFFN(num_blocks=8, num_active=4)`.
        seq_tokens: the sequence length at which costs are printed.

    Raises:
        PlanError: a config matches nothing, or two claim one site; the message names both and lists the sites.
        UnknownFamily: no adapter knows the model.
        ValueError: a size does not fit (head width, FFN width, number of blocks).
    """
    if not configs:
        raise PlanError("plan() was given no config. Give at least one, e.g. RoutedFFN().")
    model = library_model(model)
    anatomy = describe(model)
    edits: list[Edit] = []
    untouched: dict[str, int] = {}
    for config in configs:
        method = method_of(config)
        if method.edits is None:
            raise PlanError(f"{config.method!r} makes a new model and edits none. Use grow(model, config).")
        new = method.edits(config, anatomy, model)
        sites = method.site_names(anatomy)
        if not new:
            raise PlanError(_no_match(config, anatomy, sites))
        untouched[config.method] = len(sites) - len(new)
        edits.extend(new)
    _refuse_double_claims(edits)
    return Plan(anatomy.model_class, anatomy.family, configs, tuple(edits), seq_tokens, untouched)


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
