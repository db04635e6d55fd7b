"""What is predicted for: a model's config as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model's config as its JSON file holds it, the name to train it by, and the most tokens it takes."""

    name: str
    values: dict[str, Any]
    folder: str | None = None

    @property
    def context(self) -> int | None:
        inner = self.values.get("text_config")
        return usable_positions(inner if isinstance(inner, dict) else self.values)

    @property
    def hidden_size(self) -> int | None:
        inner = self.values.get("text_config")
        return (inner if isinstance(inner, dict) else self.values).get("hidden_size")


_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
_AFTER_PADDING = ("roberta", "camembert", "xmod", "data2vec-text", "longformer", "luke", "mpnet", "esm", "ibert",
                  "lilt", "layoutlmv3", "markuplm")  # fmt: skip
"""Families (as part of their names) whose positions begin after the padding token's id: 514 rows hold 512 tokens."""


def usable_positions(values: Mapping[str, Any]) -> int | None:
    """The most tokens that a model of these config values takes; None if they set no limit."""
    found = (values.get(name) for name in _POSITIONS)
    rows = next((row for row in found if isinstance(row, int) and row > 0), None)
    if rows is None or not any(family in str(values.get("model_type")) for family in _AFTER_PADDING):
        return rows
    padding = values.get("pad_token_id")
    return max(0, rows - (padding if isinstance(padding, int) else 0) - 1)
