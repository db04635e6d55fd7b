"""The mark on weights that were saved by a converted model: they and a sidecar belong together, or say that they don't.

A sidecar that was left behind, or one beside weights that were written over, would give other numbers in silence. So
the weights say which sidecar is theirs: an adapter in the metadata of its file, a model in its `config.json`. Libraries
read past both. So an adapter that would compute something else on the dense model is also of a kind of its own, which
plain PEFT refuses to load.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sparsetrain.core.errors import CheckpointError
from sparsetrain.runs.manifest import read_json, write_json

ENTRY = "sparsetrain"
"""Name of the entry in an adapter's metadata and in a model's config."""
_ADAPTER, _CONFIG, _KIND = "adapter_model.safetensors", "config.json", "adapter_config.json"
_OURS = "SPARSETRAIN_"


def plain_kind(kind: Any) -> str | None:
    """PEFT's kind of an adapter of our kind; None for one of PEFT's own."""
    return kind.removeprefix(_OURS) if isinstance(kind, str) and kind.startswith(_OURS) else None


def mark_weights(folder: Path, mark: dict[str, Any], *, needs_us: bool) -> bool:
    """Write a mark into an adapter or a model; False where there is neither.

    Args:
        needs_us: the adapter would compute something else on the dense model.
    """
    adapter, config = folder / _ADAPTER, folder / _CONFIG
    if adapter.is_file():
        with safe_open(str(adapter), framework="pt") as file:
            # an adapter names few megabytes: it is written once more
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = {**(file.metadata() or {}), ENTRY: json.dumps(mark)}
        temporary = folder / f".{_ADAPTER}.tmp"
        save_file(tensors, str(temporary), metadata=metadata)
        os.replace(temporary, adapter)
        if needs_us and (config := folder / _KIND).is_file():
            values = read_json(config)
            kind = values.get("peft_type")
            write_json(config, values | {"peft_type": f"{_OURS}{plain_kind(kind) or kind}"})
    elif config.is_file():
        write_json(config, read_json(config) | {ENTRY: mark})
    else:
        return False
    return True


def drop_modules(folder: Path, names: Collection[str]) -> None:
    """Leave these modules out of an adapter that was just saved: it is for a model that has none of them."""
    adapter = folder / _ADAPTER
    with safe_open(str(adapter), framework="pt") as file:
        kept = [key for key in file.keys() if not any(f".{name}." in key for name in names)]  # noqa: SIM118
        tensors, metadata = {key: file.get_tensor(key) for key in kept}, file.metadata()
    save_file(tensors, str(adapter), metadata=metadata)
    values = read_json(folder / _KIND)
    left = [name for name in values.get("modules_to_save") or [] if name not in names]
    write_json(folder / _KIND, values | {"modules_to_save": left or None})


def mark_of(folder: Path) -> dict[str, Any] | None:
    """The mark on the weights of a folder; None without one.

    Raises:
        CheckpointError: the file that would hold it is damaged.
    """
    adapter, config = folder / _ADAPTER, folder / _CONFIG
    if adapter.is_file():
        try:
            with safe_open(str(adapter), framework="pt") as file:
                found = json.loads((file.metadata() or {}).get(ENTRY, "null"))
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{adapter} cannot be read: {error}.") from None
    else:
        found = read_json(config).get(ENTRY) if config.is_file() else None
    return found if isinstance(found, dict) else None


def check_mark(folder: Path, state: Any) -> None:
    """Raise CheckpointError if weights and sidecar do not belong together.

    Args:
        state: the sidecar's entry of that name; None where it has none.
    """
    if state is None:
        return
    mark = mark_of(folder)
    if mark is None or mark.get("state") != state:
        found = "were saved by a dense model" if mark is None else "were saved with another sidecar"
        raise CheckpointError(
            f"the weights in {folder} {found}, so its sidecar is of an earlier save, and together they would give "
            "other numbers. Save the model anew, or take sidecar and weights from one save."
        )


def refuse_lone_weights(source: str | Path, mark: Any) -> None:
    """Raise CheckpointError if weights without a sidecar bear a mark: they were saved by a converted model."""
    if not isinstance(mark, dict):
        return
    names = [entry["method"] for entry in mark.get("configs", []) if isinstance(entry, dict) and "method" in entry]
    raise CheckpointError(
        f"{source} holds weights that were trained with {', '.join(map(str, names)) or 'a sparse method'}, and no "
        "sidecar beside them (sparsity_config.json), so they would run dense. Copy it and its state file from where "
        "they were saved (from the hub: download the whole repository, and name the folder). To run them dense all the "
        f"same, load them with transformers, or with PEFT once {_OURS} is removed from {_KIND}."
    )
