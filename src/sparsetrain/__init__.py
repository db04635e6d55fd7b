"""sparsetrain: fine-tune and train Transformers with less memory and time, through sparsity.

Three verbs: `plan` says what a recipe would change, `sparsify` changes a model in place, `grow` makes a larger one.
Names are imported when they are first used, so that `sparsetrain --help` need not wait for torch.
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
    from sparsetrain.methods import FloodFillAttention as FloodFillAttention
    from sparsetrain.methods import PQAttention as PQAttention
    from sparsetrain.methods import RoutedFFN as RoutedFFN
    from sparsetrain.methods import SemiStructured as SemiStructured
    from sparsetrain.methods import TokenSelection as TokenSelection
    from sparsetrain.surgery.apply import Handle as Handle
    from sparsetrain.surgery.apply import sparsify as sparsify
    from sparsetrain.surgery.grow import grow as grow
    from sparsetrain.surgery.plan import Plan as Plan
    from sparsetrain.surgery.plan import plan as plan

__version__ = "0.1.0"

_HOMES = {
    "use_backend": "core.backend",
    "MethodConfig": "core.config",
    "CheckpointError": "core.errors",
    "PlanError": "core.errors",
    "UnknownFamily": "core.errors",
    "Unsupported": "core.errors",
    "FloodFillAttention": "methods",
    "PQAttention": "methods",
    "RoutedFFN": "methods",
    "SemiStructured": "methods",
    "TokenSelection": "methods",
    "Handle": "surgery.apply",
    "sparsify": "surgery.apply",
    "grow": "surgery.grow",
    "Plan": "surgery.plan",
    "plan": "surgery.plan",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsetrain' has no attribute {name!r}")
    import sparsetrain.methods  # noqa: F401  (enters every method in the registry)

    value = getattr(import_module(f"sparsetrain.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
