"""Which process wrote something, and whether it is still there: host, number, and when it began.

A number alone is used again by the system, so the moment of the start belongs to it.
"""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Process:
    """started: what tells this process from a later one of the same number; letters and digits."""

    host: str
    pid: int
    started: str

    @classmethod
    def this(cls) -> Self:
        """The process that asks."""
        return cls(host=socket.gethostname(), pid=os.getpid(), started=_started(os.getpid()) or "")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self | None:
        """What was written of one; None if it is not that."""
        host, pid, started = (values.get(key) for key in ("host", "pid", "started"))
        if not (isinstance(host, str) and isinstance(pid, int) and pid > 0 and isinstance(started, str)):
            return None
        return cls(host=host, pid=pid, started=started)

    @property
    def is_local(self) -> bool:
        """It belongs to this machine, so that one can tell whether it is running."""
        return self.host == socket.gethostname()

    @property
    def is_running(self) -> bool:
        """Of a local one; unknown moments count as equal."""
        found = _started(self.pid)
        return found is not None and (not found or not self.started or found == self.started)

    @property
    def tag(self) -> str:
        """For names of files: host, number and start."""
        return f"{_host_tag(self.host)}-{self.pid}-{self.started or '0'}"


def dead_tag(tag: str) -> bool:
    """Whether a `Process.tag` is of a process of this machine that is gone."""
    host, pid, started = tag.split("-")
    if host != _host_tag(socket.gethostname()):
        return False
    return not Process(host=socket.gethostname(), pid=int(pid), started="" if started == "0" else started).is_running


def _host_tag(host: str) -> str:
    return hashlib.sha256(host.encode()).hexdigest()[:8]


def _started(pid: int) -> str | None:
    """When a process of this machine began; "" where that is not told, None if there is no such process."""
    if Path("/proc/self/stat").is_file():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        # ended, and not yet waited for: nothing of it runs
        return None if fields[0] in "ZX" else f"{fields[19]}x{_boot()}"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    found = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, check=False).stdout
    return hashlib.sha256(found).hexdigest()[:12] if found.strip() else ""


@cache
def _boot() -> str:
    """Ticks count from the machine's start, so they need its name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "")[:8]
    except OSError:
        return ""
