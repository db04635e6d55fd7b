"""Files that strangers may have made: regular ones only, of bounded size and depth, read as plain values.

A named pipe or a device would block for ever, and a JSON file of gigabytes or of a thousand levels takes the memory or
the stack of whoever parses it.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from sparsetrain.core.quote import quoted

MOST_JSON_BYTES = 64 * 2**20
MOST_LEVELS = 64


def regular_file(path: str | Path, most_bytes: int | None = None, *, may_be_empty: bool = False) -> Path:
    """The path, if it leads to a regular file that is not empty; a link is followed, as a hub's cache is made of them.

    Raises:
        ValueError: it does not, or the file is larger than `most_bytes`.
    """
    path, shown = Path(path), quoted(str(path))
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        broken = "is a link that leads nowhere" if os.path.islink(path) else "cannot be read"
        raise ValueError(f"{shown} {broken}: {quoted(getattr(error, 'strerror', None) or str(error))}.") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{shown} is no regular file (a folder, a named pipe or a device). Put the file itself there.")
    if found.st_size == 0 and not may_be_empty:
        raise ValueError(f"{shown} is empty: 0 bytes. It was truncated; get it again.")
    if most_bytes is not None and found.st_size > most_bytes:
        raise ValueError(f"{shown} has {found.st_size:,} bytes; at most {most_bytes:,} are read of such a file.")
    return path


def read_plain_json(path: str | Path, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """The value of a JSON file.

    Raises:
        ValueError: no regular file, too large, not UTF-8, not JSON, or nested deeper than `MOST_LEVELS`.
    """
    regular_file(path, most_bytes)
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{quoted(str(path))} cannot be read as JSON: {quoted(str(error))}.") from None
    except RecursionError:
        raise ValueError(_too_deep(path)) from None
    if not _shallow(value):
        raise ValueError(_too_deep(path))
    return value


def read_plain_object(path: str | Path, most_bytes: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """As `read_plain_json`, for a file that holds one object.

    Raises:
        ValueError: as there, or it holds something else.
    """
    value = read_plain_json(path, most_bytes)
    if not isinstance(value, dict):
        raise ValueError(f"{quoted(str(path))} holds {type(value).__name__}, no JSON object. It is of something else.")
    return value


def _shallow(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return True
    return False


def _too_deep(path: str | Path) -> str:
    return f"{quoted(str(path))} is nested deeper than {MOST_LEVELS} levels. No file of a model is; get it again."
