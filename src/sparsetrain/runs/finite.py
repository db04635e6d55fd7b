"""Whether all numbers of a checkpoint are finite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsetrain.core.errors import CheckpointError
from sparsetrain.runs.layout import OPTIMIZER
from sparsetrain.runs.sidecar import STATE


def not_finite(folder: Path) -> str | None:
    """The first tensor of a checkpoint that is infinite or not a number, as a sentence begins; None if there is none.

    Weights and the optimizer's moments are all finite. What methods keep beside them may use infinity as a mark, and
    its records, which are in float64, may have gaps.

    Raises:
        CheckpointError: a file cannot be read.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(path), framework="pt") as file:
                for name in list(file.keys()):
                    tensor = file.get_tensor(name)
                    record = path.name == STATE and tensor.dtype == torch.float64
                    if not (record or is_finite(tensor, path.name == STATE)):
                        return f"{name} in {path} is not finite"
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}.") from None
    path = folder / OPTIMIZER
    if path.is_file():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # its reader has many
            raise CheckpointError(f"{path} cannot be read: {error}.") from None
        if not all(map(is_finite, _tensors(state))):
            return f"the optimizer's state in {path} is not finite"
    return None


def is_finite(tensor: Tensor, infinity: bool = False) -> bool:
    """Whether each number is finite, or with `infinity` at least a number."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.element_size() == 1:  # float8: no kernels for it
        tensor = tensor.float()
    return not bool(tensor.isnan().any()) if infinity else bool(tensor.isfinite().all())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
