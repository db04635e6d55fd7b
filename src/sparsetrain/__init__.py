"""sparsetrain: fine-tune and train Transformers with less memory and time, through sparsity.

Three verbs: `plan` says what a recipe would change, `sparsify` changes a model in place, `grow` makes a larger one.
"""

from sparsetrain.core.anatomy import register_anatomy as _register_anatomy
from sparsetrain.core.backend import use_backend as use_backend
from sparsetrain.core.config import MethodConfig as MethodConfig
from sparsetrain.core.errors import CheckpointError as CheckpointError
from sparsetrain.core.errors import PlanError as PlanError
from sparsetrain.core.errors import UnknownFamily as UnknownFamily
from sparsetrain.core.errors import Unsupported as Unsupported
from sparsetrain.methods import PQAttention as PQAttention
from sparsetrain.methods import RoutedFFN as RoutedFFN
from sparsetrain.surgery.apply import Handle as Handle
from sparsetrain.surgery.apply import sparsify as sparsify
from sparsetrain.surgery.grow import grow as grow
from sparsetrain.surgery.plan import Plan as Plan
from sparsetrain.surgery.plan import plan as plan

__version__ = "0.1.0"

# by name: transformers is imported only when one of its models is described
_register_anatomy("transformers", "sparsetrain.hf.anatomy:describe_model")
_register_anatomy("peft", "sparsetrain.hf.anatomy:describe_model")
