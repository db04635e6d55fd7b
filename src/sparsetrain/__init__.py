"""sparsetrain: fine-tune and train Transformers with less memory and time, through sparsity.

Three verbs: `plan` says what a recipe would change, `sparsify` changes a model in place, `grow` makes a larger one.
The config of every method is here under its name. Names are imported when they are first used, so that
`sparsetrain --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsetrain.core.backend import use_backend as use_backend
    from sparsetrain.core.config import MethodConfig as MethodConfig
    from sparsetrain.core.errors import CheckpointError as CheckpointError
    from sparsetrain.core.errors import PlanError as PlanError
    from sparsetrain.core.errors import UnknownFamily as UnknownFamily
    from sparsetrain.core.errors import Unsupported as Unsupported
    from sparsetrain.methods import *  # noqa: F403
    from sparsetrain.surgery.apply import Handle as Handle
    from sparsetrain.surgery.apply import sparsify as sparsify
    from sparsetrain.surgery.deploy import DeployDense as DeployDense
    from sparsetrain.surgery.grow import grow as grow
    from sparsetrain.surgery.plan import Plan as Plan
    from sparsetrain.surgery.plan import plan as plan

__version__ = "0.2.0"

_HOMES = {
    "use_backend": "core.backend",
    "MethodConfig": "core.config",
    "CheckpointError": "core.errors",
    "PlanError": "core.errors",
    "UnknownFamily": "core.errors",
    "Unsupported": "core.errors",
    "Handle": "surgery.apply",
    "sparsify": "surgery.apply",
    "DeployDense": "surgery.deploy",
    "grow": "surgery.grow",
    "Plan": "surgery.plan",
    "plan": "surgery.plan",
}


def __getattr__(name: str) -> object:
    if name.startswith("_"):  # asked by tools of import and inspection
        raise AttributeError(f"module 'sparsetrain' has no attribute {name!r}")
    methods = import_module("sparsetrain.methods")  # enters every method in the registry
    if name in _HOMES:
        value = getattr(import_module(f"sparsetrain.{_HOMES[name]}"), name)
    elif name in _configs():
        value = getattr(methods, name)
    else:
        raise AttributeError(f"module 'sparsetrain' has no attribute {name!r}")
    globals()[name] = value
    return value


def _configs() -> list[str]:
    """Names of the config classes of our own methods."""
    methods = import_module("sparsetrain.methods")
    kinds = import_module("sparsetrain.core.config").registered_methods().values()
    return [kind.__name__ for kind in kinds if getattr(methods, kind.__name__, None) is kind]


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_configs()})
