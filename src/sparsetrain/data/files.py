"""Which files a source means: regular ones alone, each once, in sorted order."""

import fnmatch
import functools
import glob
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from sparsetrain.core.quote import LONGEST, quoted
from sparsetrain.data.remarks import Remarks

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_PATH_ENDS = (".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".md", ".json", ".py", ".gz", ".parquet")


def find_files(source: str | Path | Sequence[str | Path], remarks: Remarks | None = None) -> list[Path] | None:
    """The files of a source in sorted order: a file, a folder (all below it), a glob, or a list of these.

    Hidden files and folders and `__pycache__` below a folder are not part of it; links to folders are followed, unless
    they lead to one that they lie in. A file with several names is read once. None when the source is one name that is
    neither a path nor looks like one: it may be a data set of the hub.

    Raises:
        ValueError: a path is blank, does not exist, cannot be read or is no regular file; a folder, glob or list holds
            no file.
    """
    remarks = remarks or Remarks()
    if isinstance(source, str | Path):
        found = _files_of(source, remarks, must_exist=False)
        return None if found is None else _each_once(found, remarks)
    if not source:
        raise ValueError("The list of sources is empty. Name at least one file, folder or glob.")
    return _each_once([file for part in source for file in _files_of(part, remarks, must_exist=True) or []], remarks)


def shown(path: str | Path) -> str:
    """A path as a message may show it: of a long one the end, which tells it from others."""
    text = str(path)
    return quoted(text if len(text) <= LONGEST else "…" + text[1 - LONGEST :])


def is_packed(path: Path) -> bool:
    """Whether a file says that it is compressed by gzip."""
    return path.suffix.lower() == ".gz"


def kind_of(path: Path) -> str:
    """The ending that says what a file holds, in small letters: of `a.jsonl.gz` it is .jsonl."""
    return Path(path.stem if is_packed(path) else path.name).suffix.lower()


def path_of(source: str | Path) -> Path:
    """A source as a path.

    Raises:
        ValueError: it is blank, an address, or its `~` names nobody's home.
    """
    if not str(source).strip():
        raise ValueError("The data's name is blank. Name a file, folder or glob, an embedded set, or a hub data set.")
    if "://" in str(source):
        raise ValueError(f"{shown(source)} is an address, and only local files are read. Fetch it and name the file.")
    try:
        return Path(source).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{shown(source)}: {error} Write the folder out.") from None


def check_regular(path: Path) -> os.stat_result:
    """A file's size and more, if it is one that can be read to its end: no pipe, device, socket or kernel file.

    Raises:
        ValueError: it is none, or cannot be reached.
    """
    try:
        about = path.stat()
    except FileNotFoundError:
        what = f"is a link to {os.readlink(path)}, which" if path.is_symlink() else "is gone, or"
        raise ValueError(f"{shown(path)} {quoted(what)} does not exist. Correct it or leave it out.") from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if not stat.S_ISREG(about.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(about.st_mode)), "no regular file")
        raise ValueError(f"{shown(path)} is {kind}, not a regular file. Write what it gives to a file; name that.")
    if about.st_dev in _kernel_devices():
        raise ValueError(f"{shown(path)} is made by the kernel, not a file on a disk. Copy it to a file; name that.")
    return about


def unreadable(path: Path, error: Exception) -> ValueError:
    """What to raise when the system refuses a file or folder."""
    reason = getattr(error, "strerror", None) or str(error)
    return ValueError(f"{shown(path)} cannot be read: {quoted(reason)}. Correct that, or leave it out of the data.")


def walk_files(root: Path, leave_out: Collection[str] = (), remarks: Remarks | None = None) -> Iterator[Path]:
    """All files below a folder in sorted order, without hidden ones, `__pycache__` and folders named in `leave_out`.

    Raises:
        ValueError: a folder cannot be read.
    """
    for folder, names in _walk(root, leave_out, remarks or Remarks()):
        yield from (folder / name for name in names)


def _walk(root: Path, leave_out: Collection[str], remarks: Remarks) -> Iterator[tuple[Path, list[str]]]:
    """Every folder from `root` down, with the names of its files."""
    seen: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        folders, files = _entries(folder)
        about = folder.stat()
        if about.st_dev in _kernel_devices():
            raise ValueError(f"{shown(folder)} is the kernel's, not a folder on a disk. Name one with your data.")
        if (about.st_dev, about.st_ino) in seen:
            continue
        seen.add((about.st_dev, about.st_ino))
        yield folder, [name for name in files if not name.startswith(".")]
        below = [n for n in folders if not n.startswith(".") and n != "__pycache__" and n not in leave_out]
        for name in reversed(below):
            if (folder / name).is_symlink() and folder.resolve().is_relative_to((folder / name).resolve()):
                remarks.add("links to a folder above not followed", folder / name)
            else:
                waiting.append(folder / name)


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of a folder's folders (and links to such), and of everything else in it."""
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                (folders if os.path.isdir(entry.path) else files).append(entry.name)
    except OSError as error:
        raise unreadable(folder, error) from None
    return sorted(folders), sorted(files)


@functools.cache
def _kernel_devices() -> frozenset[int]:
    """What `/proc` and `/sys` lie on: files there look regular, and some never end."""
    return frozenset(os.stat(folder).st_dev for folder in ("/proc", "/sys") if os.path.ismount(folder))


def _each_once(files: list[Path], remarks: Remarks) -> list[Path]:
    found: dict[object, Path] = {}
    for path in files:
        about = check_regular(path)
        same = (about.st_dev, about.st_ino) if about.st_ino else path.resolve()
        if same in found:
            remarks.add("files under a second name read once", path)
        found.setdefault(same, path)
    return list(found.values())


def _files_of(source: str | Path, remarks: Remarks, must_exist: bool) -> list[Path] | None:
    path = path_of(source)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = 0
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if stat.S_ISDIR(mode):
        files = list(walk_files(path, remarks=remarks))
        if not files:
            raise ValueError(
                f"The folder {shown(path)} holds no files (hidden ones aside). Put the data there or name another."
            )
        return files
    if mode or path.is_symlink():
        check_regular(path)
        return [path]
    if glob.has_magic(str(path)):
        return _matching(path, remarks)
    if must_exist or _looks_like_path(source):
        raise _missing(path)
    return None


def _missing(path: Path) -> ValueError:
    nearest = next((parent for parent in path.absolute().parents if parent.is_dir()), Path("/"))
    try:
        found = ", ".join(sorted(os.listdir(nearest))[:8]) or "nothing"
    except OSError:
        found = "a folder that cannot be read"
    return ValueError(f"{shown(path)} does not exist. Found in {shown(nearest)}: {quoted(found)}. Correct the path.")


def _matching(pattern: Path, remarks: Remarks) -> list[Path]:
    """The files that match a glob. Unlike `glob`, a folder that cannot be read is an error, and loops of links end."""
    first, *parts = pattern.parts
    found = [Path(first)] if pattern.anchor else _step([Path()], first, not parts, remarks)
    for i, part in enumerate(parts):
        found = _step(found, part, i == len(parts) - 1, remarks)
    files = sorted((path for path in found if not path.is_dir()), key=str)
    if not files:
        only = " but folders" if found else ""
        raise ValueError(
            f"No file matches '{shown(pattern)}': found nothing{only}. Correct the pattern ('**' reaches sub-folders)."
        )
    for path in found:
        if path.is_dir():
            remarks.add("sub-folders not read, as the pattern stops there", path)
    return files


def _step(found: list[Path], part: str, last: bool, remarks: Remarks) -> list[Path]:
    """What one more part of a pattern makes of the paths that matched up to it."""
    folders = [path for path in found if path.is_dir()]
    if part == "**":
        every = [(folder, names) for root in folders for folder, names in _walk(root, (), remarks)]
        below = [folder / name for folder, names in every for name in names] if last else [f for f, _ in every]
        return list(dict.fromkeys(below))
    if not glob.has_magic(part):
        return [path / part for path in folders if os.path.lexists(path / part)]
    hidden = part.startswith(".")
    return [
        folder / name
        for folder in folders
        for names in _entries(folder)
        for name in names
        if fnmatch.fnmatchcase(name, part) and (hidden or not name.startswith("."))
    ]


def _looks_like_path(source: str | Path) -> bool:
    """Hub names are 'name' or 'owner/name'; everything else that does not exist is a mistyped path."""
    text = str(source)
    return (
        isinstance(source, Path)
        or text.startswith((".", "/", "~"))
        or text.count("/") > 1
        or "\\" in text
        or text.endswith(("/", *_PATH_ENDS))
    )
