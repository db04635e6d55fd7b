"""Files that appear whole or not at all, JSON that any reader takes, and what killed processes have left of both."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsetrain.core.process import Process, dead_tag

_SCRATCH = re.compile(r"\.(?P<name>.+)\.(?P<tag>[0-9a-f]{8}-\d+-\w+)\.sparsetrain-(?P<kind>tmp|old)", re.ASCII)


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write a file by one rename; what was there stays until then.

    Raises:
        OSError: it cannot be written (`filename` is `path`); nothing is left behind.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    with scratch_file(path) as scratch, scratch.open("wb") as file:
        file.write(data)


@contextmanager
def scratch_file(path: str | Path) -> Iterator[Path]:
    """A name beside `path` to write to; the file takes the place of `path` when the block ends, unless it raises.

    Raises:
        OSError: of the block too, with `path` as its file.
    """
    path = Path(path)
    scratch = scratch_of(path)
    try:
        scratch.touch()
        usual = scratch.stat().st_mode
        scratch.unlink()
        yield scratch
        may_read(scratch, usual)
        sync(scratch)
        os.replace(scratch, path)
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def may_read(path: Path, mode: int) -> None:
    """Let whoever may read by `mode` read the file: safetensors writes for its owner alone, whatever the umask."""
    own = path.stat().st_mode
    if (wanted := own | mode & 0o444) != own:
        with contextlib.suppress(OSError):  # a file system may have no modes, and what was written is whole
            path.chmod(wanted)


def scratch_of(path: Path, kind: str = "tmp") -> Path:
    """A name beside `path` that says whose it is, so that `sweep` finds it when this process was killed."""
    name = os.fsencode(path.name)[:180].decode(errors="ignore")  # a name has at most 255 bytes
    return path.with_name(f".{name}.{Process.this().tag}.sparsetrain-{kind}")


def is_scratch(name: str) -> bool:
    """Whether a name is one that `scratch_of` gives."""
    return _SCRATCH.fullmatch(name) is not None


def sweep(folder: str | Path) -> None:
    """Remove what killed processes of this machine have left half-done in a folder; nothing else is touched.

    What one had moved aside to put something in its place goes back if nothing is there.
    """
    try:
        found = [(path, _SCRATCH.fullmatch(path.name)) for path in Path(folder).iterdir() if path.name[0] == "."]
    except OSError:
        return
    for path, match in found:
        if match is None or not dead_tag(match["tag"]):
            continue
        place = path.with_name(match["name"])
        with contextlib.suppress(OSError):
            if match["kind"] == "old" and not place.exists():
                os.replace(path, place)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any, *, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """JSON that any reader takes: what is not finite becomes null.

    Raises:
        TypeError: a value has no JSON form, and no `default` gives it one.
    """
    return json.dumps(plain(value), indent=indent, allow_nan=False, default=default)


def plain(value: Any) -> Any:
    """JSON values: dataclasses as dicts, tensors and arrays of one number as numbers, what is not finite as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        value = value.item()  # type: ignore[attr-defined]
    return None if isinstance(value, float) and not math.isfinite(value) else value
