"""`sparsetrain doctor`: what this machine has, what is fast on it, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer

from sparsetrain.cli.answer import Answer, table
from sparsetrain.cli.flags import Debug, Json
from sparsetrain.cli.known import KNOWN, SETTINGS

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
    "jinja2": "3.1",
    "gguf": "0.16",
}
OPTIONAL = {"trl": ("1.8", "needed only to train with TRL's SFTTrainer")}

State = Literal["ok", "note", "missing"]
_COLOURS = {"ok": "green", "note": "yellow", "missing": "red"}


@dataclass(frozen=True)
class Check:
    """One line. state: ok; note, worth knowing; missing, sparsetrain cannot work."""

    name: str
    state: State
    found: str
    advice: str = ""


Network = Annotated[
    bool, typer.Option("--network", help="Time the network between a launcher's ranks instead, for `plan --gpus`.")
]


def doctor(network: Network = False, json: Json = False, debug: Debug = False) -> Answer | None:
    """Check this machine: versions, devices, which number formats are fast, embedded assets, known clashes.

    Takes a few seconds and changes nothing. Ends with 1 if something that is required is missing.

    \b
    Examples:
      sparsetrain doctor
      sparsetrain doctor --json > machine.json
      torchrun --nproc-per-node 2 -m sparsetrain doctor --network
    """
    if network:
        from sparsetrain.cli.network import network_answer

        return network_answer()
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
    checks = [
        _python(),
        *(_required(name, floor) for name, floor in REQUIRED.items()),
        *_optional(),
        *clashes(),
        *contradictions(),
    ]
    if importlib.util.find_spec("torch") is not None:
        checks += _machine()
    return [*checks, *_tools(), *_assets()]


def _python() -> Check:
    good = sys.version_info >= (3, 11)
    advice = "" if good else "Install Python 3.11 or newer."
    return Check("python", "ok" if good else "missing", platform.python_version(), advice)


def _required(name: str, floor: str) -> Check:
    found, wanted = installed_version(name), f"{name}>={floor}" if floor else name
    if found is None:
        return Check(name, "missing", "not installed", f'pip install "{wanted}"')
    if floor and numbers(found) < numbers(floor):
        return Check(name, "missing", f"{found}, needs {floor} or newer", f'pip install --upgrade "{wanted}"')
    return Check(name, "ok", found)


def _optional() -> list[Check]:
    checks = []
    for name, (floor, purpose) in OPTIONAL.items():
        found = installed_version(name)
        old = found is not None and numbers(found) < numbers(floor)
        advice = f'{purpose}: pip install "{name}>={floor}"' if found is None or old else ""
        checks.append(Check(name, "note" if advice else "ok", found or "not installed", advice))
    return checks


def clashes() -> list[Check]:
    checks = []
    for known in KNOWN:
        found = installed_version(known.package)
        if found is None:
            continue
        late = bool(known.at_least) and numbers(found) < numbers(known.at_least)
        early = bool(known.below) and numbers(found) >= numbers(known.below)
        if not (late or early):
            checks.append(Check(known.package, "note", found, f"{known.effect}: {known.do}"))
    for setting in SETTINGS:
        if os.environ.get(setting.variable) == setting.value:
            checks.append(Check(setting.variable, "note", setting.value, f"{setting.effect}: {setting.do}"))
    return checks


def contradictions() -> list[Check]:
    """Installed packages that ask for other versions of ours than are here, by what they say of themselves."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:  # it comes with transformers, whose line says that it is missing
        return []
    here, checks = {name: installed_version(name) for name in (*REQUIRED, *OPTIONAL)}, []
    for package in importlib.metadata.distributions():
        for line in package.requires or ():
            try:
                asked = Requirement(line)
            except InvalidRequirement:
                continue
            found = here.get(asked.name.lower())
            if found is None or (asked.marker is not None and not asked.marker.evaluate({"extra": ""})):
                continue
            if not asked.specifier.contains(found, prereleases=True):
                says = f"asks for {asked.name}{asked.specifier}, and {found} is here: keep it in another environment"
                checks.append(Check(package.metadata["Name"], "note", package.version, says))
    return checks


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
        major, minor = torch.cuda.get_device_capability(index)
        driver = f", driver {card['driver_version']}" if "driver_version" in card else ""
        found = f"{card['name']}, {card['memory_bytes'] / 1e9:.0f} GB, capability {major}.{minor}{driver}"
        checks.append(Check(f"cuda:{index}", "ok", found))
        devices.append(f"cuda:{index}")
    if torch.backends.mps.is_available():
        checks.append(Check("mps", "ok", "Apple GPU"))
        devices.append("mps")
    if len(devices) == 1:
        checks.append(Check("gpu", "note", "none that torch can use", "Runs on the CPU; start with small models."))
    facts = [
        fact for device in devices for fact in (formats(device), kernels(device), *others(device), *fastest(device))
    ]
    return checks + facts


def others(device: str) -> list[Check]:
    """Who runs the other operations on a device, and why."""
    from sparsetrain.ops.who_runs import backends

    return [Check(f"{name} on {device}", "ok", text) for name, text in backends(device).items()]


def fastest(device: str) -> list[Check]:
    """What runs timed on this device to choose by, since the machine started."""
    import torch

    from sparsetrain.core.fastest import all_timings

    return [Check(f"{known.op} on {device}", "ok", str(known)) for known in all_timings(torch.device(device))]


def formats(device: str) -> Check:
    """Time one matrix product in each number format that is trained in, anew, and leave what was found to later runs:
    a format can be supported and still be slow."""
    from sparsetrain.measure.rates import formats_of

    try:
        from sparsetrain.hf.assets import cache_folder

        folder = cache_folder() / "machine"
    except ImportError:  # told by the line of what is missing
        folder = None
    found = formats_of(device, folder, anew=True)
    gflops = {name: rate / 1e9 for name, rate in found.gemm_flops.items()}
    shares = {name: "" if name == "fp32" else f" ({rate / gflops['fp32']:.1f}x)" for name, rate in gflops.items()}
    text = ", ".join(f"{name} {rate:,.{0 if rate >= 10 else 1}f}{shares[name]}" for name, rate in gflops.items())
    each = " GFLOP/s a thread" if found.device == "cpu" else " GFLOP/s"
    return Check(f"formats on {device}", "ok", text + each, f"--dtype auto takes {found.why}.")


def kernels(device: str) -> Check:
    """Who runs the attention of selected tokens on a device, and why our kernels do not, where they do not."""
    import torch

    from sparsetrain.ops.selected_rows.choice import on_device

    names, reason = on_device(torch.device(device))
    state: State = "note" if reason and device.startswith("cuda") else "ok"
    return Check(f"selected tokens on {device}", state, ", ".join(names), "" if state == "ok" else f"{reason}.")


def _tools() -> list[Check]:
    compiler = next((path for name in ("g++", "clang++", "cl") if (path := shutil.which(name))), None)
    checks = [
        Check("C++ compiler", "ok", _first_line(compiler, "--version") or compiler)
        if compiler
        else Check("C++ compiler", "note", "none", "needed only by torch.compile on a CPU: install g++ or clang")
    ]
    triton = installed_version("triton")
    if triton:
        checks.append(Check("triton", "ok", triton))
    else:
        checks.append(Check("triton", "note", "not installed", "needed only on a GPU; everything runs without it"))
    return checks


def _first_line(*command: str) -> str:
    """The first line that a command prints, or nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


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


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: '2.13.0+cpu' -> (2, 13, 0), '3.0rc1' -> (3, 0)."""
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in leading.group().split(".")) if leading else ()
