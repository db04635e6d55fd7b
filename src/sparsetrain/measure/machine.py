"""The machine and the versions behind a number; never a host name, a user or a path."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# the instruction sets that decide which kernels run, as Linux names them
_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "triton", "numpy", "sparsetrain")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What ran: `cores` are those this process may use, `load_average` the last 1, 5 and 15 minutes."""

    system: str
    cpu: str
    cpu_flags: tuple[str, ...]
    cores: int
    threads: int
    memory_bytes: int | None
    load_average: tuple[float, ...] | None
    gpus: tuple[dict[str, Any], ...]
    versions: dict[str, str]
    commit: str | None
    dirty: bool | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe_machine() -> Machine:
    """Describe the machine as it is now. Package versions come from metadata, so nothing is imported for them."""
    commit, dirty = commit_of_source()
    fields = cpu_fields()
    known = (fields.get("flags") or fields.get("Features") or "").split()
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        cpu=fields.get("model name") or platform.processor() or platform.machine(),
        cpu_flags=tuple(flag for flag in _FLAGS if flag in known),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_bytes=_memory_bytes(),
        load_average=_load_average(),
        gpus=_gpus(),
        versions=_versions(),
        commit=commit,
        dirty=dirty,
    )


def cpu_fields() -> dict[str, str]:
    """The first processor's fields of /proc/cpuinfo; nothing elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def free_bytes(device: torch.device) -> int | None:
    """Memory that this process may take beside what it holds, on a device; None where the system doesn't say."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    found = [_kib("/proc/meminfo", "MemAvailable:"), _left_of_group(Path("/sys/fs/cgroup"))]
    return min((size for size in found if size is not None), default=None)


def _kib(file: str, field: str) -> int | None:
    try:
        lines = Path(file).read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)
    except (OSError, ValueError, IndexError):
        return None


def _left_of_group(group: Path) -> int | None:
    """What a control group's limit leaves; None without a limit. Its cache of files can be dropped: free."""
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):  # "max" is no number: there is no limit
        return None


def _load_average() -> tuple[float, ...] | None:
    try:
        return tuple(round(load, 2) for load in os.getloadavg())
    except (AttributeError, OSError):
        return None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions


def _gpus() -> tuple[dict[str, Any], ...]:
    if not torch.cuda.is_available():
        return ()
    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        found.append({"name": properties.name, "memory_bytes": properties.total_memory, **_clocks(i)})
    return tuple(found)


def _clocks(index: int) -> dict[str, str]:
    """Clock, power limit and driver, where the driver's tool is at hand."""
    keys = ("clocks.sm", "power.limit", "driver_version")
    answer = output_of("nvidia-smi", f"--id={index}", f"--query-gpu={','.join(keys)}", "--format=csv,noheader")
    values = [value.strip() for value in (answer or "").split(",")]
    return dict(zip(keys, values, strict=True)) if len(values) == len(keys) else {}


def commit_of_source() -> tuple[str | None, bool | None]:
    """The commit of the repository that tracks this very file; an installed copy has none."""
    here = Path(__file__).resolve()
    git = ("git", "-C", str(here.parent))
    if output_of(*git, "ls-files", "--error-unmatch", here.name) is None:
        return None, None
    commit = output_of(*git, "rev-parse", "--short=12", "HEAD")
    changes = output_of(*git, "status", "--porcelain", "--untracked-files=no")
    return commit, None if changes is None else bool(changes)


def output_of(*command: str) -> str | None:
    """What a command prints, or None if it fails or is missing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
