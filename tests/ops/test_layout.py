"""What every op's folder keeps to."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

import sparsetrain.ops

ROOT = Path(sparsetrain.ops.__path__[0])
OPS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
WITH_REFERENCE = [op for op in OPS if (ROOT / op / "reference.py").is_file()]


@pytest.mark.parametrize("op", [op for op in OPS if (ROOT / op / "torch.py").is_file()])
def test_torch_means_pytorch_only_where_no_backend_hides_it(op: str) -> None:
    """Importing a folder's `torch.py` binds `torch` in its `__init__`, in place of what `import torch` put there."""
    tree = ast.parse((ROOT / op / "__init__.py").read_text(encoding="utf-8"))
    names = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert "torch" not in names, f"{op}/__init__.py: say `from torch import ...`"


@pytest.mark.parametrize("op", WITH_REFERENCE)
def test_an_op_with_a_reference_has_cases(op: str) -> None:
    cases = import_module(f"sparsetrain.ops.{op}.cases")
    names = [case.name for case in (*cases.TINY, *cases.REAL)]
    assert cases.TINY and len(set(names)) == len(names)
    assert cases.__doc__
