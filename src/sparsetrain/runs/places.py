"""Can it be written there? Asked before anything is read or trained; nothing is left behind."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from sparsetrain.core.files import scratch_of
from sparsetrain.core.quote import quoted

LONGEST_NAME, LONGEST_PATH = 230, 3500
"""Bytes: what Linux takes (255, 4096), less what is put beside or into a folder while it is written."""


def check_folder(folder: str | Path, what: str) -> None:
    """Raise ValueError unless `folder` is a folder that can be written to, or can be made.

    Args:
        what: how the message calls it, e.g. `output folder`.
    """
    folder = Path(folder)
    _check_name(folder, what)
    place, found = folder, _kind(folder)
    while found == "absent" and place != place.parent:
        place = place.parent
        found = _kind(place)
    named = f"{what} {quoted(str(folder))}"
    if found != "folder" and place == folder:
        raise ValueError(f"{named} is {found}. Choose a folder.")
    if found != "folder":
        raise ValueError(f"{named} lies under {quoted(str(place))}, which is {found}. Choose a place in a folder.")
    try:
        probe = scratch_of(place / "writable")  # known as ours, should this process be killed before the next line
        probe.mkdir(exist_ok=True)
        probe.rmdir()
    except OSError as error:
        raise ValueError(
            f"{named} cannot be written: {quoted(str(place))}: {error.strerror}. Choose another place."
        ) from None


def check_file(path: str | Path, what: str, endings: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless `path` can be written as a regular file.

    Args:
        what: how the message calls it, e.g. `--plot`.
        endings: what the name may end in; () for anything.
    """
    path = Path(path)
    named = f"{what} {quoted(str(path))}"
    _check_name(path, what)
    found = _kind(path)
    if found not in ("absent", "a file"):
        raise ValueError(f"{named} is {'a folder' if found == 'folder' else found}. Give the name of a file.")
    if endings and path.suffix.lower() not in endings:
        raise ValueError(f"{named}: the name ends in {path.suffix or 'nothing'}. Use {' or '.join(endings)}.")
    if found == "a file" and not os.access(path, os.W_OK):
        raise ValueError(f"{named} cannot be written: permission denied. Choose another place.")
    check_folder(path.parent, f"{what} {quoted(path.name)}: its folder")


def _check_name(path: Path, what: str) -> None:
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in str(path)):
        raise ValueError(f"{what} {quoted(str(path))} holds characters that are no text. Choose another name.")
    sizes = [len(os.fsencode(part)) for part in path.parts]
    if max(sizes, default=0) > LONGEST_NAME or sum(sizes) + len(sizes) > LONGEST_PATH:
        raise ValueError(f"{what} {quoted(str(path))}: the name is too long. Choose a shorter one.")


def _kind(path: Path) -> str:
    """`absent`, `folder`, `a file`, or what else is there."""
    if os.path.isdir(path):  # these never raise, where a Path's own do for a name that is too long
        return "folder"
    if os.path.islink(path) and not os.path.exists(path):
        return "a symbolic link to nothing"
    if os.path.exists(path):
        return "a file" if os.path.isfile(path) else "a device or pipe"
    return "absent"
