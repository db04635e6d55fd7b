"""Which number format a machine multiplies fastest in: what `dtype: auto` takes.

That a processor has a format is no proof that it is fast: bf16 products run at 4.5 times the rate of fp32's on one CPU,
and at a quarter on another. So they are timed (`measure.rates.formats_of`) once a boot, and remembered. Nothing here
imports torch: a plan that is answered from the cache does not wait for it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from sparsetrain.core.remembered import name_here, recall, remember

VARIABLE = "SPARSETRAIN_DTYPE"
"""The environment variable that says what auto takes, in place of what was timed: the same on every machine."""
PAYS = 1.3
"""bf16 is taken from so many times fp32's rate: half the rest of a step gains nothing, and bf16 rounds 65,536 times as
coarsely."""


@dataclass(frozen=True, kw_only=True)
class Formats:
    """What was timed.

    device: cpu, cuda or mps.
    gemm_flops: format (fp32, bf16) -> FLOP/s of a square matrix product; on a CPU those of one thread.
    threads: of the process that timed it.
    """

    device: str
    gemm_flops: dict[str, float]
    threads: int

    @property
    def fastest(self) -> str:
        return fastest(self.gemm_flops)

    @property
    def why(self) -> str:
        """What is taken and why, in a line."""
        where = "CPU" if self.device == "cpu" else "GPU"
        if "bf16" not in self.gemm_flops:
            return f"fp32: this {where} multiplies no bf16"
        ratio = self.gemm_flops["bf16"] / self.gemm_flops["fp32"]
        if self.fastest == "bf16":
            return f"bf16: {ratio:.1f}x faster matrix products on this {where}; --dtype fp32 for full precision"
        if ratio < 0.5:
            return f"fp32: bf16 is {1 / ratio:.0f}x slower on this {where}"
        return f"fp32: bf16 is {ratio:.1f}x as fast on this {where}; --dtype bf16 halves the frozen weights"


def fastest(gemm_flops: Mapping[str, float]) -> str:
    """`bf16` where its products are at least `PAYS` times as fast as those of fp32, or fp32 was not timed."""
    if "bf16" not in gemm_flops:
        return "fp32"
    return "bf16" if gemm_flops["bf16"] >= PAYS * gemm_flops.get("fp32", 0.0) else "fp32"


def asked_of_all() -> str | None:
    """What the environment says that auto is to take.

    Raises:
        ValueError: it says something else than fp32 or bf16.
    """
    asked = os.environ.get(VARIABLE)
    if asked not in (None, "", "fp32", "bf16"):
        raise ValueError(f"{VARIABLE}={asked[:40]} is no format. Set it to fp32 or bf16, or unset it.")
    return asked or None


def recall_formats(folder: Path, device: str) -> Formats | None:
    """What was timed for a recipe's `device` since the machine started; None if nothing was.

    Args:
        folder: where it is remembered.
        device: auto, cpu, mps, cuda or cuda:N.
    """
    text = recall(folder / name_here("formats", device))
    return None if text is None else Formats(**json.loads(text))


def remember_formats(folder: Path, device: str, found: Formats) -> None:
    remember(folder / name_here("formats", device), json.dumps(asdict(found)))
