"""The house keeps its shape: what is public, what may import what, and words that are not used."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

import sparsetrain
import sparsetrain.methods  # enters every method in the registry
from sparsetrain.core.config import registered_methods
from sparsetrain.hf.model.attention import NAME

SOURCE = Path(sparsetrain.__file__).parent


def test_importing_the_package_imports_no_hugging_face_library_and_no_triton() -> None:
    code = (
        "import sys, sparsetrain; "
        "names = ('transformers', 'peft', 'trl', 'datasets', 'accelerate', 'diffusers', 'triton', 'matplotlib'); "
        "print([name for name in names if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    # torch itself imports triton where it is installed
    assert set(eval(out)) <= {"triton"}


def test_every_method_has_its_folder_and_page() -> None:
    for folder in (SOURCE / "methods").iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            for name in ("__init__.py", "config.py", "module.py", "surgery.py", "README.md", "evidence.json"):
                assert (folder / name).exists(), f"{folder.name}/{name}"


def test_every_op_has_a_reference() -> None:
    helpers = {"segments", "routing", "balanced_clustering"}  # plain PyTorch throughout: they are their own reference
    for folder in (SOURCE / "ops").iterdir():
        if folder.is_dir() and folder.name not in helpers | {"__pycache__"}:
            assert (folder / "reference.py").exists(), folder.name


def test_the_attention_name_is_taken_for_no_other_backend() -> None:
    assert not any(word in NAME for word in ("flash", "sdpa", "flex_attention", "/", "|"))


def test_no_file_is_named_for_nothing_in_particular() -> None:
    for file in SOURCE.rglob("*.py"):
        assert not any(word in file.stem for word in ("util", "helper", "manager", "wrapper")), file


ABOVE = ("measure", "data", "parallel", "recipes", "runs", "planner", "hf", "cli")
"""Floors above the methods."""
DATA = ("recipes/presets.py",)
"""Files above the methods that may name them: they are data."""


def words_of_code(source: str) -> Iterator[tuple[int, str]]:
    """(line, word) of every identifier and every string that is no docstring."""
    tree = ast.parse(source)
    bodies = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, bodies) and _begins_with_text(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias):
            yield node.lineno, node.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            yield node.lineno, node.value


def _begins_with_text(node: ast.AST) -> bool:
    first = node.body[0] if node.body else None  # type: ignore[attr-defined]
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)


def named_methods(source: str) -> list[tuple[int, str]]:
    """Where a source names a method of ours: (line, name). A name begins a word: `upstream` names none."""
    kinds = [kind for kind in registered_methods().values() if kind.__module__.startswith("sparsetrain.")]
    names = [name for kind in kinds for name in (kind.method, kind.__name__)]
    return [
        (line, name)
        for line, word in words_of_code(source)
        for name in names
        if re.search(rf"(?<![A-Za-z]){name}", word)
    ]


def test_no_method_is_named_above_its_floor() -> None:
    found = {
        str(file.relative_to(SOURCE)): named
        for floor in ABOVE
        for file in sorted((SOURCE / floor).rglob("*.py"))
        if str(file.relative_to(SOURCE)) not in DATA and (named := named_methods(file.read_text()))
    }
    assert not found, found


@pytest.mark.parametrize(
    "source",
    ["from sparsetrain.methods import RoutedFFN", "x = 'routed_ffn'", "y = PQAttention()", "z = m.TokenSelection"],
)
def test_a_named_method_is_found(source: str) -> None:
    assert named_methods(source) and not named_methods(f'"""{source}"""')


def test_no_circle_of_files() -> None:
    graph = grimp.build_graph("sparsetrain", exclude_type_checking_imports=True)
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in graph.find_modules_directly_imported_by(module):
                visit(other, [*path, module])
            done.add(module)

    for module in sorted(graph.modules):
        visit(module, [])


KERNELS = {"torch.py", "triton.py", "tiles.py", "products.py", "reference.py"}
"""Files of an op that may hold long functions: a kernel is read in one scroll."""


def test_files_and_functions_keep_a_readable_size() -> None:
    long = []
    for file in sorted(SOURCE.rglob("*.py")):
        lines = file.read_text().splitlines()
        kernel = file.relative_to(SOURCE).parts[0] == "ops" and file.name in KERNELS
        if len(lines) > 300 and not kernel:
            long.append(f"{file.relative_to(SOURCE)}: {len(lines)} lines")
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef) and not kernel:
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > 60:
                    long.append(f"{file.relative_to(SOURCE)}: {node.name} has {length} lines")
    assert not long, long


def test_the_edge_stays_small() -> None:
    files = [file for file in (SOURCE / "hf").rglob("*.py") if "assets" not in file.parts]
    assert sum(len(file.read_text().splitlines()) for file in files) < 11500
