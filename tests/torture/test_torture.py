"""A sample of the torture; all of it is `make torture`. Slow: some hundred commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("part", ["inputs", "kills", "disks", "doubles"])
def test_sample(part: str, tmp_path: Path) -> None:
    # a process of its own: what it forks must not have started a pool of threads
    command = [sys.executable, "-m", "tests.torture", part, "--share", "0.1", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    found = json.loads((tmp_path / "torture.json").read_text())
    assert done.returncode == 0, found["faults"]
    assert found["counts"][part]["cases"] >= {"inputs": 160, "kills": 10, "disks": 2, "doubles": 2}[part]
