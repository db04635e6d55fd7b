"""What was found out once and is kept in the cache folder: taken only as it was written, else found out again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from sparsetrain.core.files import sweep, write_whole
from sparsetrain.core.plain_files import read_plain_object


def remember(path: Path, text: str) -> None:
    """Write it whole, with its checksum, or not at all: a folder that cannot be written costs only time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        write_whole(path, json.dumps({"sha256": _sha256(text), "text": text}))
    except OSError:
        return


def recall(path: Path) -> str | None:
    """What `remember` wrote; None where there is none, or it is not what was written."""
    try:
        stored = read_plain_object(path)
        text = stored["text"]
        return text if stored["sha256"] == _sha256(text) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
