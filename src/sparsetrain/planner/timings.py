"""Speeds that were timed on this machine at a shape, kept in the cache folder so that a second run need not wait."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsetrain.core.remembered import recall, remember
from sparsetrain.planner.choosing import Speed


def key_of(about: Mapping[str, Any]) -> str:
    """Names what a timing depends on: the model, the shape, the machine, the versions."""
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:24]


def load_speeds(path: Path) -> dict[str, Speed]:
    """Way -> its speed; empty when nothing is kept, or it is not what was kept."""
    try:
        return {label: Speed(**values) for label, values in json.loads(recall(path) or "{}").items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def store_speeds(speeds: Mapping[str, Speed], path: Path) -> None:
    """Write them whole or not at all; a folder that cannot be written costs only the time of the next timing."""
    remember(path, json.dumps({label: vars(speed) for label, speed in speeds.items()}))
