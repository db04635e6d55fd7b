"""What a converted model keeps about its conversion, so that whoever saves or loads its weights finds it there.

The weights are half of a converted model: patterns, permutations and masks are in no state dict. A saver that knows the
model alone (a Trainer, PEFT) writes both down by this record, and a loader compares both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsetrain.core.anatomy import Undo, submodule
from sparsetrain.core.config import MethodConfig
from sparsetrain.surgery.method import Edit, State
from sparsetrain.surgery.site import Site

_NAME = "_sparsity"


@dataclass(eq=False)
class Record:
    """One conversion.

    installed: every edit with its module, as the handle has them.
    about: entries for the sidecar: `base_model`, `task`, ….
    deploys_dense: the product is the dense model, and what was installed is no part of it.
    handle: what `sparsify` returned, for a trainer that is given the model alone.
    """

    configs: tuple[MethodConfig, ...]
    installed: list[tuple[Edit, Site]]
    about: dict[str, Any] = field(default_factory=dict)
    deploys_dense: bool = False
    handle: Any = None

    def state(self) -> State:
        """`handle.state()`."""
        return {edit.key: module.tensors() for edit, module in self.installed}

    def adopt(self, model: nn.Module, state: State) -> list[str]:
        """Make each site what `state` says where it differs; the keys of those.

        Args:
            model: the one that was converted; it holds the weights that were saved with the state.

        Raises:
            ValueError: a site cannot become what the state says.
        """
        changed = []
        for edit, module in self.installed:
            wanted = state.get(edit.key, {})
            if not same_tensors(module.tensors(), wanted):
                try:
                    module.take(submodule(model, edit.site), wanted)
                except (KeyError, RuntimeError, ValueError) as error:
                    raise ValueError(f"{edit.key} cannot become what was saved: {error}.") from None
                changed.append(edit.key)
        return changed


def attach(model: nn.Module, record: Record) -> Undo:
    """Leave a record with a model."""
    records: list[Record] = vars(model).setdefault(_NAME, [])
    records.append(record)

    def undo() -> None:
        records.remove(record)

    return undo


def records_of(model: nn.Module) -> list[tuple[nn.Module, Record]]:
    """(the converted model, its record) of every conversion of a model or of the model inside its adapter."""
    inner: Any = model.get_base_model() if hasattr(type(model), "get_base_model") else model  # type: ignore[operator]
    roots = [model] if inner is model else [model, inner]
    return [(root, record) for root in roots for record in vars(root).get(_NAME, ())]


def handles_of(model: nn.Module) -> list[Any]:
    """The handle of every conversion of a model, wherever it stands inside another."""
    return [record.handle for module in model.modules() for record in vars(module).get(_NAME, ())]


def joined(records: Iterable[Record]) -> Record | None:
    """All conversions of a model as one; None without any."""
    found = list(records)
    if len(found) < 2:
        return found[0] if found else None
    about = {name: value for record in found for name, value in record.about.items()}
    configs = tuple(config for record in found for config in record.configs)
    installed = [pair for record in found for pair in record.installed]
    return Record(configs, installed, about, all(record.deploys_dense for record in found))


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Are they equal bit for bit, wherever they are? A NaN is equal to itself."""
    return one.keys() == other.keys() and all(_same_bits(one[name], other[name]) for name in one)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    a, b = (x.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for x in (one, other))
    return bool(torch.equal(a, b))
