"""Methods of another package, loaded by entry point, go through the contract like ours, and need nothing above."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROBES = sorted(path for path in (HERE / "sparsetrain_probes").glob("*.py") if path.name != "__init__.py")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where the probes are installed: their folder holds the package and its metadata."""
    places = [str(HERE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)


def test_there_are_five_of_at_most_eighty_lines() -> None:
    assert len(PROBES) == 5
    for path in PROBES:
        assert len(path.read_text().splitlines()) <= 80, path.name


def test_a_broken_package_is_named_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "broken-1.dist-info").mkdir()
    (tmp_path / "broken-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (tmp_path / "broken-1.dist-info" / "entry_points.txt").write_text("[sparsetrain.methods]\nbad = not_there_at_all\n")
    code = "import sparsetrain; print(sparsetrain.RoutedFFN.method)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert out.stdout.strip() == "routed_ffn"
    assert "entry point bad (not_there_at_all) cannot be loaded" in out.stderr


@pytest.mark.parametrize(
    "asked",
    [
        "installed or toy_ and (llama or unet2d)",
        *(pytest.param(f"toy_ and ({f})", marks=pytest.mark.slow) for f in ("gpt2 or bert", "vit or opt")),
    ],
)
def test_they_keep_the_contract_and_are_known_and_trained(asked: str) -> None:
    """Takes some thirty seconds: a process of its own has the probes installed, and runs the contract and `installed`.

    Of both kinds of model one is quick: what a family has of its own, our own methods ask of it.
    """
    out = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/methods/test_contract.py", "tests/probes/installed.py",
        "-m", "not slow and not gpu", "-k", asked,
    )  # fmt: skip
    assert out.returncode == 0, out.stdout[-6000:]
