"""Files written whole and checked when read: one rename makes them appear, a manifest of sha256 says they are whole.

A process may be killed, or a disk may fill up, between any two writes. So a folder is complete only if it holds
`manifest.json`, which is written last; a single file or a whole folder takes its place by one rename.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparsetrain.core.errors import CheckpointError
from sparsetrain.core.files import may_read, scratch_of, sweep, sync, to_json, write_whole
from sparsetrain.core.plain_files import read_plain_object
from sparsetrain.core.quote import quoted

MANIFEST = "manifest.json"
FORMAT = 1
"""Raise when an older reader would misread what is written."""


_OF_A_SHORT_WRITE = ("PytorchStreamWriter failed writing", "unexpected pos", "iostream error")
"""What torch.save says of one."""


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """A scratch folder beside `folder` that takes its place when the block ends, and vanishes if it raises.

    Raises:
        ValueError: there is something in its place that was not written here.
    """
    target = Path(folder).resolve()  # a link stays, and what it points to is replaced
    refuse_foreign(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    scratch, replaced = scratch_of(target), scratch_of(target, "old")
    scratch.mkdir()
    try:
        yield scratch
        sync_folder(scratch)
        refuse_foreign(target)
        if target.exists():
            os.replace(target, replaced)
        os.replace(scratch, target)
        sync(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def refuse_foreign(folder: Path) -> None:
    """Raise ValueError if a folder of ours is to be where something else is; an empty folder is nothing."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    about = json_in(folder / MANIFEST)
    if not (isinstance(about, dict) and isinstance(about.get("files"), dict) and "format" in about):
        raise ValueError(
            f"{folder} is there already, and sparsetrain did not write it ({MANIFEST} is missing or of another "
            "program), so it is not replaced. Move it away, or choose another folder."
        )


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON by one rename; what is not finite becomes null."""
    write_whole(path, to_json(value, indent=1) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        return read_plain_object(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def json_in(path: Path) -> Any:
    """What a JSON file holds; None if there is none to read."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None


def write_manifest(folder: str | Path, **entries: Any) -> None:
    """Record size and sha256 of every file of a folder, last, so that a folder with a manifest is whole; who may read
    the folder may read them."""
    folder = Path(folder)
    sync_folder(folder)
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != MANIFEST]
    for path in paths:
        may_read(path, folder.stat().st_mode)
    files = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in paths}
    write_json(folder / MANIFEST, {"format": FORMAT, **entries, "files": files})
    sync(folder)


def drop_manifest(folder: str | Path) -> None:
    """Remove a folder's manifest, if it is one of ours: what it says is about to be untrue."""
    path = Path(folder) / MANIFEST
    try:
        ours = {"format", "files"} <= read_json(path).keys()
    except CheckpointError:
        return
    if ours:
        path.unlink()


def verify_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest, after every file it lists was found with its size and sha256.

    Raises:
        CheckpointError: names the first file that is missing, truncated or altered.
    """
    folder = Path(folder)
    manifest = read_json(folder / MANIFEST)
    for name, entry in _listed(manifest, folder).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {MANIFEST} lists it with {entry['bytes']:,} bytes.")
        if path.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{path} has {path.stat().st_size:,} bytes instead of {entry['bytes']:,}: it was truncated or changed."
            )
        if sha256_of(path) != entry["sha256"]:
            raise CheckpointError(f"{path} does not have the sha256 it was written with: its content has changed.")
    return manifest


def _listed(manifest: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """The files that a manifest lists, all inside its folder: path -> bytes and sha256."""
    files = manifest.get("files", {})
    entries = files.items() if isinstance(files, dict) else [("files", files)]
    for name, entry in entries:
        whole = isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        if not whole or Path(name).is_absolute() or ".." in Path(name).parts or not name.isprintable():
            raise CheckpointError(
                f"{folder / MANIFEST} is damaged at {quoted(name)}: {quoted(entry, 60)} is no file of its folder."
            )
    return files


@contextmanager
def disk_errors(folder: str | Path) -> Iterator[None]:
    """Turn every library's way of saying that the disk is full into one OSError that names the folder."""
    try:
        yield
    except Exception as error:  # tokenizers raises no other kind
        number = _disk_error(error, Path(folder))
        if number is None or (isinstance(error, OSError) and error.filename):  # it names the file
            raise
        raise OSError(number, os.strerror(number), str(folder)) from error


def _disk_error(error: BaseException | None, folder: Path) -> int | None:
    """The errno of a full disk, quota or size limit behind an exception, or None."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    while error is not None:
        if isinstance(error, OSError) and error.errno in full:
            return error.errno
        for number in full:  # safetensors quotes the system's words
            if os.strerror(number) in str(error) or f"(os error {number})" in str(error):
                return number
        if any(words in str(error) for words in _OF_A_SHORT_WRITE):
            # torch.save hides the cause of a write that stopped short
            existing = next(place for place in (folder, *folder.parents) if place.exists())
            return errno.ENOSPC if shutil.disk_usage(existing).free < 2**26 else errno.EFBIG
        error = error.__cause__ or error.__context__
    return None


def sha256_of(path: Path) -> str:
    """Of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: str | Path) -> None:
    """Flush every file of a folder, and the folder, to the disk."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            sync(path)
    sync(Path(folder))
