"""Reading what a user names: a regular file of bounded size, as text or JSON; never a pipe or a device."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any


def read_text(path: str | Path, most_bytes: int) -> str:
    """The UTF-8 text of a regular file.

    Raises:
        ValueError: no such file, no regular one, larger than `most_bytes`, or not UTF-8; the message lacks the path.
    """
    # opening a pipe waits for a writer, unless it is told not to
    without_waiting = getattr(os, "O_NONBLOCK", 0)
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | without_waiting)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("it is no regular file")
            content = file.read(most_bytes + 1)
    except OSError as error:
        raise ValueError(str(error.strerror)) from None
    if len(content) > most_bytes:
        raise ValueError(f"it is larger than {most_bytes:,} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_object(path: str | Path, most_bytes: int = 2**24) -> dict[str, Any]:
    """The JSON object of a regular file.

    Raises:
        ValueError: as `read_text`; no JSON, nested too deep, or no object; the message lacks the path.
    """
    try:
        value = json.loads(read_text(path, most_bytes))
    except RecursionError:
        raise ValueError("its values nest too deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds a JSON {type(value).__name__}, not an object")
    return value
