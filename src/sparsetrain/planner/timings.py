"""Speeds that were timed on this machine at a shape, kept in the cache folder so that a second run need not wait."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsetrain.core.files import sweep, write_whole
from sparsetrain.core.plain_files import read_plain_object
from sparsetrain.planner.choosing import Speed


def key_of(about: Mapping[str, Any]) -> str:
    """Names what a timing depends on: the model, the shape, the machine, the versions."""
    return _sha256(json.dumps(about, sort_keys=True, default=str))[:24]


def load_speeds(path: Path) -> dict[str, Speed]:
    """Way -> its speed; empty when nothing is kept, or it is not what was kept."""
    try:
        stored = read_plain_object(path)
        if stored["sha256"] != _sha256(stored["speeds"]):
            return {}
        return {label: Speed(**values) for label, values in json.loads(stored["speeds"]).items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def store_speeds(speeds: Mapping[str, Speed], path: Path) -> None:
    """Write them whole or not at all; a folder that cannot be written costs only the time of the next timing."""
    text = json.dumps({label: vars(speed) for label, speed in speeds.items()})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        write_whole(path, json.dumps({"sha256": _sha256(text), "speeds": text}))
    except OSError:
        return


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
