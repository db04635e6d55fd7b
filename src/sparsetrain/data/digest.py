"""Hashes of rows: that two runs have the same ones, and saw them in the same order."""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import numpy as np
from torch import Tensor

from sparsetrain.data.collate import Collate


def data_fingerprint(rows: Any) -> str:
    """A hash of the number of rows and of a hundred of them, evenly spread."""
    digest = hashlib.sha256(str(len(rows)).encode())
    for i in range(0, len(rows), max(1, len(rows) // 100)):
        digest.update(repr({key: list(v) if hasattr(v, "__iter__") else v for key, v in rows[i].items()}).encode())
    return digest.hexdigest()[:16]


class OrderedCollator:
    """A collator that hashes the rows it is given, so that two runs can be shown to have seen the same."""

    def __init__(self, collate_fn: Collate) -> None:
        self.collate_fn = collate_fn
        self._crc = 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        for row in rows:
            content = next(value for name, value in row.items() if name != "labels")
            self._crc = zlib.crc32(np.asarray(content).tobytes(), self._crc)
        return self.collate_fn(rows)

    @property
    def digest(self) -> str:
        return f"{self._crc:08x}"
