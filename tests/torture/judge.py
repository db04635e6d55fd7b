"""What no case may do, whatever it was given."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path

from tests.torture.fork import Ended

CPU_SECONDS, RSS_BYTES, MARK, FOREIGN = 25.0, 3 * 2**30, "executed", "foreign"
CODES = (0, 1, 2, 130)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def faults_of(ended: Ended, folder: Path, before: dict[str, str], *, must_fail: bool, as_json: bool) -> list[str]:
    """Names of the faults of a case that has ended in `folder`; `before`: what `snapshot` said of it."""
    said = ended.out + ended.err
    found = {
        "traceback": "Traceback (most recent call last)" in said,
        "please report": "please report" in said,
        "ended by a signal": ended.code < 0 and not ended.late,
        "unknown exit code": ended.code >= 0 and ended.code not in CODES,
        "hang": ended.late or ended.cpu_seconds > CPU_SECONDS,
        "memory": ended.rss_bytes > RSS_BYTES,
        "executed": any(folder.rglob(MARK)),
        "taken for good": must_fail and ended.code == 0,
        "silent": ended.code in (1, 2) and not said.strip(),
        "long message": ended.code in (1, 2) and len(ended.err) > 6000,
        "control characters": bool(_CONTROL.search(_without_colours(ended.err))),
        "foreign files touched": touched(folder, before),
    }
    if as_json and not found["traceback"]:
        found["not JSON"] = not _is_json(ended.out)
    faults = [name for name, is_fault in found.items() if is_fault]
    out = folder / "out"
    if ended.code == 2 and (out.exists() or out.is_symlink()) and not any(n.startswith("out") for n in before):
        faults.append("left something behind")
    return faults + half_written(folder, before)


def touched(folder: Path, before: dict[str, str]) -> bool:
    """Has a file that someone else wrote changed, or gone?"""
    now = snapshot(folder / FOREIGN)
    return any(now.get(name) != found for name, found in before.items() if name.startswith(FOREIGN))


def snapshot(folder: Path) -> dict[str, str]:
    """The hash of every file below a folder, by its name."""
    root = folder.parent if folder.name == FOREIGN else folder
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def half_written(folder: Path, before: dict[str, str]) -> list[str]:
    """New files of the output that no reader could take: JSON that isn't, safetensors cut off. Temporary files may stay
    after a kill, under names that no reader asks for."""
    now = {name: found for name, found in snapshot(folder).items() if name.startswith("out/")}
    return [f"half-written {name}" for name, found in now.items() if before.get(name) != found
            and not _whole(folder / name)]  # fmt: skip


def _whole(path: Path) -> bool:
    if any(part.startswith(".") for part in path.parts[-3:]):
        return True
    if path.suffix == ".json":
        return _is_json(path.read_text(encoding="utf-8", errors="replace"))
    if path.suffix == ".safetensors":
        return _is_safetensors(path)
    return path.stat().st_size > 0 or path.suffix not in (".yaml", ".html", ".png")


def _is_safetensors(path: Path) -> bool:
    raw = path.read_bytes()
    if len(raw) < 8:
        return False
    (size,) = struct.unpack("<Q", raw[:8])
    try:
        header = json.loads(raw[8 : 8 + size])
    except ValueError:
        return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return len(raw) == 8 + size + max(ends, default=0)


def _is_json(text: str) -> bool:
    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


def _without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "")
