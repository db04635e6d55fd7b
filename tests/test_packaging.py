"""What a wheel holds, what a command imports before it has work to do, and the files that describe the project."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
HEAVY = ("torch", "transformers", "peft", "datasets", "numpy", "matplotlib", "jinja2")


@pytest.mark.parametrize("arguments", [["--help"], ["finetune", "--help"], ["plan", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    """Torch alone takes seconds to import, and help is asked for often."""
    code = (
        "import sys; from sparsetrain.cli import run; "
        f"code = run({arguments!r}); print('heavy:', [name for name in {HEAVY!r} if name in sys.modules]); "
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_every_file_that_is_no_python_is_named_for_the_wheel() -> None:
    source = REPO / "src" / "sparsetrain"
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["sparsetrain"]
    named = {path for pattern in patterns for path in source.glob(pattern)}
    others = {
        path
        for path in source.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and path.name != "README.md"
    }
    assert others == named


def test_extras_are_small_and_dev_has_what_the_tests_import() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert {"trl", "diffusion", "gpu", "docs", "dev"} <= extras.keys()
    for name in ("trl", "diffusion", "docs"):
        assert set(extras[name]) <= set(extras["dev"]), f"the tests need the extra {name}"
    versions = [each.rpartition(" :: ")[2] for each in PROJECT["project"]["classifiers"] if "Python :: 3." in each]
    assert versions == ["3.11", "3.12", "3.13"]


def test_the_image_copies_what_the_package_needs() -> None:
    words = (REPO / "Dockerfile").read_text(encoding="utf-8").split()
    needed = [PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], "pyproject.toml", "src"]
    ignored = (REPO / ".dockerignore").read_text(encoding="utf-8").split()
    assert all(name in words and f"!{name}" in ignored for name in needed)


@pytest.mark.parametrize(
    "form", sorted((REPO / ".github" / "ISSUE_TEMPLATE").glob("[0-9]*.yml")), ids=lambda path: path.stem
)
def test_forms_for_issues_are_well_made(form: Path) -> None:
    asked = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= asked.keys()
    assert all(field["type"] in ("textarea", "input") and field["attributes"]["label"] for field in asked["body"])
