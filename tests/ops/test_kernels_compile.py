"""Our Triton kernels compile for GPUs, also where there is none: the interpreter runs what no compiler has seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""What a block may use, by compute capability."""


@pytest.mark.interpret
@pytest.mark.slow  # the compiler takes some ten seconds a kernel
@pytest.mark.parametrize("capability", sorted(SHARED_BYTES))
def test_kernels_compile_and_fit_shared_memory(capability: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed, and its compiler comes with it")
    without = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = [sys.executable, "-m", "tests.ops.compiled_kernels", str(capability)]
    done = subprocess.run(run, env=without, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 7
    assert all(0 < kernel["shared"] <= SHARED_BYTES[capability] for kernel in found), found
