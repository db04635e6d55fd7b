"""A model's folder before any library opens it: regular files, no pickles, no adapter in disguise.

What is read of a folder is JSON, text and safetensors. Python files in it are never imported.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open

from sparsetrain.core.plain_files import read_plain_object, regular_file
from sparsetrain.core.quote import quoted

ADAPTER = "adapter_config.json"
WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
_READ = (".json", ".safetensors", ".txt", ".model", ".jinja", ".tiktoken")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".distcp")
_MOST_TEXT_BYTES = 512 * 2**20
"""The vocabulary of a large tokenizer is some 40 MB."""


def check_folder(folder: str | Path) -> None:
    """Raise ValueError if what a library would read of a model's folder is no plain file."""
    folder = Path(folder)
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise ValueError(f"{quoted(str(folder))} cannot be read: {error.strerror}.") from None
    for path in paths:
        if path.suffix in _READ:
            most = None if path.suffix == ".safetensors" else _MOST_TEXT_BYTES
            regular_file(path, most, may_be_empty=path.suffix == ".txt")  # a tokenizer may have no merges


def check_model_folder(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """The tensors that a model's folder holds: name -> shape, read off the headers of its files.

    Raises:
        ValueError: an adapter; no weights, or weights as pickles; a file that is missing, truncated or no safetensors.
    """
    folder = Path(folder)
    check_folder(folder)
    if (folder / ADAPTER).exists():
        raise ValueError(
            f"{quoted(str(folder))} is an adapter, and a model was asked for. Name its base model, or merge the two "
            "with `sparsetrain export`."
        )
    found: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(folder):
        found |= stored_shapes(path)
    if not found:
        raise ValueError(f"{quoted(str(folder))} holds no tensor in its weights. They were truncated; get them again.")
    return found


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors in a safetensors file, from its header.

    Raises:
        ValueError: it is missing, truncated, or no safetensors file.
    """
    regular_file(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(
            f"{quoted(str(path))} cannot be read as safetensors: {quoted(str(error))}. It is truncated or damaged; "
            "get it again."
        ) from None


def _weight_files(folder: Path) -> list[Path]:
    for name in (WEIGHTS, DIFFUSERS_WEIGHTS):
        if (folder / name).exists() or (folder / name).is_symlink():
            return [folder / name]
    if (folder / _INDEX).exists():
        return _shards(folder)
    shown = quoted(str(folder))
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES or path.name == ".metadata")
    if pickles:
        raise ValueError(
            f"{shown} holds no {WEIGHTS}, but {quoted(pickles[0])}: such files can run code when they are read. "
            "Where you trust it, load it with transformers and write it anew by save_pretrained."
        )
    raise ValueError(f"{shown} holds no model that can be read: no {WEIGHTS} in it. Name a folder with weights.")


def _shards(folder: Path) -> list[Path]:
    index = read_plain_object(folder / _INDEX)
    places = index.get("weight_map")
    names = set(places.values()) if isinstance(places, dict) and _all_text(places) else set()
    if not names or any(PurePosixPath(name).name != name or not name.endswith(".safetensors") for name in names):
        raise ValueError(
            f"{quoted(str(folder / _INDEX))} does not say in which of the folder's safetensors files each tensor is. "
            "It is damaged; get it again."
        )
    return [folder / name for name in sorted(names)]


def _all_text(places: dict[str, object]) -> bool:
    return all(isinstance(name, str) for name in places.values())
