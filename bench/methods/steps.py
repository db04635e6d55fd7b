"""Whole training steps of every registered method and preset beside dense LoRA: what `sparsetrain bench` measures."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.runner import Asked, Benchmark, Cell


@functools.cache
def measured(model: str, tokens: int) -> dict[str, Any]:
    """The file that the command writes; four layers, and the vocabulary in proportion."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sparsetrain.cli", "bench", "--model", model, "--seq-len", str(tokens)]
        subprocess.run([*command, "--quick", "--output", folder], check=True)
        return json.loads((Path(folder) / "bench.json").read_text())


def rest(asked: Asked) -> dict[str, Any]:
    return {name: value for name, value in measured(**asked.settings).items() if name not in ("outcomes", "machine")}


def cells(asked: Asked) -> list[Cell]:
    """One cell: the candidates are timed in turns, together."""
    return [Cell("all candidates", lambda: measured(**asked.settings)["outcomes"])]


BENCHMARKS = [
    Benchmark(
        name="steps",
        measures="whole training steps of every method and preset beside dense LoRA",
        cells=cells,
        settings={"model": "smollm2-135m", "tokens": 1024},
        quick={"tokens": 256},
        under="outcomes",
        whole=True,
        about=rest,
    )
]
