"""Our Triton kernels compile for GPUs, also where there is none: the interpreter runs what no compiler has seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""What a block may use, by compute capability."""
STACK_BYTES = {80: 320, 90: 160}
"""A thread's, of attention on selected rows. With Triton 3.9 at most 272 (dQ of packed rows) and 120 (dK and dV), both
at 128 channels."""


@pytest.mark.interpret
@pytest.mark.slow  # the compiler takes some ten seconds a kernel
@pytest.mark.parametrize("capability", sorted(SHARED_BYTES))
def test_kernels_compile_and_fit(capability: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed, and its compiler comes with it")
    without = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = [sys.executable, "-m", "tests.ops.compiled_kernels", str(capability), str(SHARED_BYTES[capability])]
    done = subprocess.run(run, env=without, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 20
    assert all(0 < kernel["shared"] <= SHARED_BYTES[capability] for kernel in found), found
    assert all(kernel["stack"] <= STACK_BYTES[capability] for kernel in found if "channels" in kernel), found
