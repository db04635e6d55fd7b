"""What is predicted for: a model's config as plain values."""

from __future__ import annotations

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
        text = self.values.get("text_config", self.values)
        found = (text.get(key) for key in ("max_position_embeddings", "n_positions"))
        return next((value for value in found if isinstance(value, int)), None)

    @property
    def hidden_size(self) -> int | None:
        return self.values.get("text_config", self.values).get("hidden_size")
