"""Weights that a growth method keeps from one stage of a run for a later one, as files in the run's folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from sparsetrain.core import ranks
from sparsetrain.core.errors import CheckpointError
from sparsetrain.core.files import write_whole
from sparsetrain.surgery.method import Weights


class KeptWeights(MutableMapping[str, Weights]):
    """Name -> weights, each in a file of its own that is found again by its hash.

    Args:
        folder: where the files are; made when the first is written.
        hashes: name -> sha256 of what is there; kept up to date, for the run's records.
    """

    def __init__(self, folder: str | Path, hashes: dict[str, str]) -> None:
        self.folder, self.hashes = Path(folder), hashes

    def __setitem__(self, name: str, weights: Weights) -> None:
        content = save({key: _owned(tensor) for key, tensor in weights.items()})
        digest = hashlib.sha256(content).hexdigest()
        if ranks.is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._path(name, digest), content)
        ranks.wait()
        self.hashes[name] = digest

    def __getitem__(self, name: str) -> Weights:
        path = self._path(name, self.hashes[name])
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}. A later stage needs it.") from None
        if hashlib.sha256(content).hexdigest() != self.hashes[name]:
            raise CheckpointError(f"{path} does not have the sha256 it was written with: its content has changed.")
        return load(content)

    def __delitem__(self, name: str) -> None:
        ranks.wait()  # until none of them reads it
        self._path(name, self.hashes.pop(name)).unlink(missing_ok=True)

    def __iter__(self) -> Iterator[str]:
        return iter(self.hashes)

    def __len__(self) -> int:
        return len(self.hashes)

    def _path(self, name: str, digest: str) -> Path:
        return self.folder / f"{name}-{digest[:16]}.safetensors"


def _owned(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone().contiguous()
