"""`sparsetrain doctor`: what this machine has, what is fast on it, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal

from sparsetrain.cli.answer import Answer, table
from sparsetrain.cli.flags import Debug, Json

# The floors of pyproject.toml; a test keeps the two equal.
REQUIRED = {
    "torch": "2.11",
    "transformers": "5.17",
    "accelerate": "1.10",
    "peft": "0.19",
    "safetensors": "0.5",
    "datasets": "3.0",
    "numpy": "",
    "pyyaml": "",
    "pydantic": "2.6",
    "typer": "0.12.5",
    "rich": "13",
    "matplotlib": "3.8",
    "gguf": "0.16",
}
OPTIONAL = {"trl": ("1.8", "needed only to train with TRL's SFTTrainer")}

# Packages that change PEFT or transformers for the whole process, or pin versions below our floor.
CLASHES = {
    "unsloth": "replaces forwards of transformers for the whole process and stops at transformers 5.5",
    "axolotl": "pins transformers 5.14.1, below our floor",
    "llamafactory": "stops at transformers 5.8, below our floor",
}
NOTES = {
    "liger-kernel": "use_liger_kernel=True rebinds FFN forwards when training starts: with routed_ffn, switch its "
    "swiglu kernel off",
}

State = Literal["ok", "note", "missing"]
_COLOURS = {"ok": "green", "note": "yellow", "missing": "red"}
GEMM_SIZE = 1024


@dataclass(frozen=True)
class Check:
    """One line. state: ok; note, worth knowing; missing, sparsetrain cannot work."""

    name: str
    state: State
    found: str
    advice: str = ""


def doctor(json: Json = False, debug: Debug = False) -> Answer:
    """Check this machine: versions, devices, which number formats are fast, embedded assets, known clashes.

    Takes a few seconds and changes nothing. Ends with 1 if something that is required is missing.

    \b
    Examples:
      sparsetrain doctor
      sparsetrain doctor --json > machine.json
    """
    checks = examine()
    missing = [check for check in checks if check.state == "missing"]
    verdict = (
        "Missing: " + ", ".join(check.name for check in missing) + ". Do what the last column says, then look again."
        if missing
        else "Ready: sparsetrain finetune --help shows how to start."
    )
    return Answer(
        data={"checks": checks, "ready": not missing},
        show=[lambda: _as_table(checks), verdict],
        code=1 if missing else 0,
    )


def _as_table(checks: list[Check]) -> Any:
    from rich.text import Text

    rows = [[c.name, Text(c.state, style=_COLOURS[c.state]), c.found, c.advice] for c in checks]
    return table("", ["what", "", "found", "advice"], rows)


def examine() -> list[Check]:
    """Every check, in the order of the table. What needs a missing package is left out."""
    checks = [_python(), *(_required(name, floor) for name, floor in REQUIRED.items()), *_optional(), *_clashes()]
    if importlib.util.find_spec("torch") is not None:
        checks += _machine()
    return [*checks, *_tools(), *_assets()]


def _python() -> Check:
    good = sys.version_info >= (3, 11)
    advice = "" if good else "Install Python 3.11 or newer."
    return Check("python", "ok" if good else "missing", platform.python_version(), advice)


def _required(name: str, floor: str) -> Check:
    found, wanted = _version(name), f"{name}>={floor}" if floor else name
    if found is None:
        return Check(name, "missing", "not installed", f'pip install "{wanted}"')
    if floor and _numbers(found) < _numbers(floor):
        return Check(name, "missing", f"{found}, needs {floor} or newer", f'pip install --upgrade "{wanted}"')
    return Check(name, "ok", found)


def _optional() -> list[Check]:
    checks = []
    for name, (floor, purpose) in OPTIONAL.items():
        found = _version(name)
        old = found is not None and _numbers(found) < _numbers(floor)
        advice = f'{purpose}: pip install "{name}>={floor}"' if found is None or old else ""
        checks.append(Check(name, "note" if advice else "ok", found or "not installed", advice))
    return checks


def _clashes() -> list[Check]:
    checks = [
        Check(name, "note", v, f"{why}; keep it in another environment")
        for name, why in CLASHES.items()
        if (v := _version(name))
    ]
    return checks + [Check(name, "note", v, why) for name, why in NOTES.items() if (v := _version(name))]


def _machine() -> list[Check]:
    import torch

    from sparsetrain.measure.machine import describe_machine

    machine = describe_machine()
    memory = f", {machine.memory_bytes / 1e9:.0f} GB of memory" if machine.memory_bytes else ""
    crowded = machine.threads > machine.cores
    advice = f"More threads than cores slow a run down: set OMP_NUM_THREADS={machine.cores}." if crowded else ""
    checks = [
        Check("cpu", "ok", f"{machine.cpu}, {machine.cores} cores{memory}"),
        Check("threads", "note" if crowded else "ok", f"torch uses {machine.threads}", advice),
    ]
    devices = ["cpu"]
    for index, card in enumerate(machine.gpus):
        checks.append(Check(f"cuda:{index}", "ok", f"{card['name']}, {card['memory_bytes'] / 1e9:.0f} GB"))
        devices.append(f"cuda:{index}")
    if torch.backends.mps.is_available():
        checks.append(Check("mps", "ok", "Apple GPU"))
        devices.append("mps")
    if len(devices) == 1:
        checks.append(Check("gpu", "note", "none that torch can use", "Runs on the CPU; start with small models."))
    return checks + [_formats(device) for device in devices]


def _formats(device: str) -> Check:
    """Time one matrix product in fp32 and bf16: a format can be supported and still be slow."""
    import torch

    gflops = {
        name: gemm_gflops(device, getattr(torch, kind)) for name, kind in (("fp32", "float32"), ("bf16", "bfloat16"))
    }
    ratio = gflops["bf16"] / gflops["fp32"]
    found = f"fp32 {gflops['fp32']:,.0f} GFLOP/s, bf16 {gflops['bf16']:,.0f} ({ratio:.1f}x)"
    if ratio < 1:
        return Check(f"formats on {device}", "note", found, "bf16 saves memory here, not time: --dtype fp32 is faster.")
    return Check(f"formats on {device}", "ok", found, "--dtype bf16 is faster." if ratio > 1.2 else "")


def gemm_gflops(device: str, dtype: Any, seconds: float = 0.5) -> float:
    """Best speed of a square matrix product after a warm-up, within about `seconds` (one product at least)."""
    import torch

    a_mk = torch.randn(GEMM_SIZE, GEMM_SIZE, device=device).to(dtype)

    def timed() -> float:
        start = time.perf_counter()
        # .item() waits for the device
        (a_mk @ a_mk)[0, 0].item()
        return time.perf_counter() - start

    begin, best = time.perf_counter(), timed()
    while time.perf_counter() - begin < seconds:
        best = min(best, timed())
    return 2 * GEMM_SIZE**3 / best / 1e9


def _tools() -> list[Check]:
    compiler = next((path for name in ("g++", "clang++", "cl") if (path := shutil.which(name))), None)
    checks = [
        Check("C++ compiler", "ok", compiler)
        if compiler
        else Check("C++ compiler", "note", "none", "needed only by torch.compile on a CPU: install g++ or clang")
    ]
    triton = _version("triton")
    if triton:
        checks.append(Check("triton", "ok", triton))
    else:
        checks.append(Check("triton", "note", "not installed", "needed only on a GPU; everything runs without it"))
    if os.environ.get("TRITON_INTERPRET") == "1":
        checks.append(
            Check(
                "TRITON_INTERPRET", "note", "1", "Kernels run in the interpreter, thousands of times slower: unset it."
            )
        )
    return checks


def _assets() -> list[Check]:
    try:
        from sparsetrain.hf.assets import asset_status, list_assets
    except ImportError as error:
        return [Check("embedded assets", "note", f"cannot be listed: {error}")]
    checks = []
    for asset in list_assets():
        status = asset_status(asset.name)
        advice = "" if status.state == "ready" else f"sparsetrain models fetch {asset.name}"
        found = f"damaged: {status.problem}" if status.state == "damaged" else status.state
        checks.append(Check(f"{asset.kind} {asset.name}", "ok" if not advice else "note", found, advice))
    return checks


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: '2.13.0+cpu' -> (2, 13, 0), '3.0rc1' -> (3, 0)."""
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in leading.group().split(".")) if leading else ()
