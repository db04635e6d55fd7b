"""What must hold before a model is converted or its schedules are driven; each raises with what was asked and found."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsetrain.surgery.deploy import Deploy, DeployDense, deployment
from sparsetrain.surgery.method import Edit, State
from sparsetrain.surgery.plan import Plan


def check_deploy(deploy: Deploy, planned: Plan) -> DeployDense | None:
    """How a model is deployed dense, None for sparse.

    Raises:
        ValueError: `deploy` is unknown, a method's product is the sparse model, or an edit takes weights away that the
            dense model would compute with.
    """
    found = deployment(deploy)
    for config in planned.configs if found is not None else ():
        if config.stays_sparse:
            raise ValueError(f"deploy='dense', and {config.method} trains a model to be used sparse. Use 'sparse'.")
    for edit in planned.edits if found is not None else ():
        if edit.replaces:
            raise ValueError(
                f"deploy='dense' needs the dense weights, and {edit.method} replaces those of {edit.site}. Use "
                "deploy='sparse', or leave the method out."
            )
    return found


def refuse_copies(model: nn.Module, edit: Edit, ours: list[str]) -> None:
    """Raise ValueError if PEFT trains a copy of a converted module, which no schedule of ours would reach."""
    module: Any = model
    for depth, part in enumerate(edit.site.split(".") if edit.site else ()):
        module = getattr(module, part)
        if isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict):
            name = ".".join(edit.site.split(".")[: depth + 1])
            raise ValueError(
                f"PEFT trains a copy of {name} (modules_to_save), and what {edit.method!r} installed there follows its "
                f"schedule in the original alone. Give modules_to_save={ours!r}, and train linears by target_modules."
            )


def check_state(state: State, planned: Plan) -> None:
    """Raise ValueError if entries fit no edit while an edit has none: those of fewer layers may be more than enough."""
    strange = sorted(set(state) - {edit.key for edit in planned.edits})
    if strange and any(edit.key not in state for edit in planned.edits):
        raise ValueError(
            f"the state is of another model or recipe: it holds {strange[0]} ({len(strange)} of {len(state)} entries "
            f"fit nothing), and this recipe makes {planned.edits[0].key}, …. Give the state of the same recipe."
        )
