"""The difference that training has made, as a small file: places and values, and which weights they belong to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsetrain.core.anatomy import innermost, library_model, submodule
from sparsetrain.core.errors import CheckpointError
from sparsetrain.core.files import scratch_file
from sparsetrain.ops.partial_weight import put_entries
from sparsetrain.surgery.apply import Handle

FORMAT = "sparsetrain-delta-1"
_CHUNK = 2**22


def weight_digest(weight: Tensor) -> Tensor:
    """SHA-256 of a weight's shape and of its values as fp32, [32] bytes: the same for a copy in a wider dtype."""
    digest = hashlib.sha256(repr(tuple(weight.shape)).encode())
    for chunk in weight.detach().reshape(-1).split(_CHUNK):
        digest.update(chunk.float().cpu().numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def save_delta(handle: Handle, path: str | Path) -> Path:
    """Write what differs from the base model, by one rename: of each tensor places (int32) and values, and its hash.

    Entries that an adjustment has frozen are among them: they have changed too.

    Raises:
        ValueError: the handle has no site of this method.
        OSError: the file cannot be written; what was there before stays.
    """
    sites: dict[str, Any] = handle.sites("sara")
    if not sites:
        raise ValueError("save_delta: no site of this handle is 'sara'. It was merged, or never converted.")
    tensors: dict[str, Tensor] = {}
    base: dict[str, str] = {}
    for site, module in sites.items():
        for name, part in module.own_parts.items():
            places, values = part.changed()
            tensors |= {f"{site}.{name}/places": places.cpu(), f"{site}.{name}/values": values.cpu()}
            base[f"{site}.{name}"] = bytes(part.base.tolist()).hex()
    about = {"format": FORMAT, "base": json.dumps(base)}
    with scratch_file(path) as scratch:
        save_file(tensors, str(scratch), metadata=about)
    return Path(path)


@torch.no_grad()
def apply_delta(model: nn.Module, path: str | Path, *, force: bool = False) -> nn.Module:
    """Write a delta into a copy of its base model, in place; all tensors or none.

    Args:
        force: also where the weights are others than those that it was made from.

    Raises:
        CheckpointError: the file is none, or damaged; the model lacks a weight that it names, or has it in another
            size, or with other values.
    """
    tensors, base = _read(Path(path))
    inner = library_model(model)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for name, expected in base.items():
        weight = _weight(inner, name)
        places, values = tensors.get(f"{name}/places"), tensors.get(f"{name}/values")
        if weight is None or places is None or values is None or places.shape != values.shape:
            raise CheckpointError(f"{path}: {name} is not in the model, or not whole in the file. Use its base model.")
        if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < weight.numel():
            raise CheckpointError(f"{path}: {name} has {weight.numel():,} entries here, and fewer than in the file.")
        if not force and bytes(weight_digest(weight).tolist()).hex() != expected:
            raise CheckpointError(
                f"{path} was made from other weights: {name} differs from its base. Load the model that was trained, "
                "untouched, or say force=True."
            )
        found.append((weight, places, values))
    for weight, places, values in found:
        put_entries(weight.detach(), places.to(weight.device), values.to(weight.device))
    return model


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        base = json.loads(about["base"]) if about.get("format") == FORMAT else None
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read as a delta: {error}. It is truncated, or no such file.") from None
    if not isinstance(base, dict):
        raise CheckpointError(f"{path} is no delta of ours: its format is {about.get('format')!r}, not {FORMAT!r}.")
    return tensors, base


def _weight(model: nn.Module, name: str) -> Tensor | None:
    owner, _, own = name.rpartition(".")
    try:
        return getattr(innermost(submodule(model, owner)), own)
    except AttributeError:
        return None
