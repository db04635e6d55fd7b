"""What was found out once and is kept in the cache folder: taken only as it was written, else found out again."""

from __future__ import annotations

import hashlib
import json
import os
import time
from importlib import metadata
from pathlib import Path

from sparsetrain.core.files import sweep, write_whole
from sparsetrain.core.plain_files import read_plain_object

_SETTINGS = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")


def cache_folder() -> Path:
    """Where it is kept, assets too: $SPARSETRAIN_CACHE, else $XDG_CACHE_HOME/sparsetrain, else ~/.cache/sparsetrain."""
    own = os.environ.get("SPARSETRAIN_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "sparsetrain"


def name_here(what: str, *depends: object) -> str:
    """A file's name for what was timed here, by all that it depends on: another boot may be on another machine."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = time.strftime("%Y-%m-%d")
    known = [*depends, boot, metadata.version("torch"), *(os.environ.get(name, "") for name in _SETTINGS)]
    return f"{what}-{hashlib.sha256(repr(known).encode()).hexdigest()[:16]}.json"


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
