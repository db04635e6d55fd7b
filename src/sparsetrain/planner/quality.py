"""What each method was seen to cost in quality, from recorded results with their source (its evidence.json)."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import sparsetrain.methods  # noqa: F401  (enters every method in the registry)
from sparsetrain.core.config import registered_methods


@dataclass(frozen=True, kw_only=True)
class Risk:
    """Quality risk of a recipe.

    ratio: perplexity before training, as a multiple of the dense model's (methods multiplied); None: not recorded.
    exact: outputs and gradients are those of the dense model.
    texts: one line a method, with the setting and the source.
    """

    ratio: float | None
    exact: bool
    texts: tuple[str, ...]

    @property
    def order(self) -> tuple[int, float, int]:
        """Sorts from safe to risky: exact; with a recorded ratio, by it and the number of methods; without."""
        return (0 if self.exact else 1 if self.ratio is not None else 2, self.ratio or 0.0, len(self.texts))


@cache
def _recorded(method: str) -> list[dict[str, Any]]:
    """The records beside a method's config; none for a method that brings none."""
    kind = registered_methods().get(method)
    source = None if kind is None else sys.modules[kind.__module__].__file__
    if source is None or not (path := Path(source).with_name("evidence.json")).is_file():
        return []
    return json.loads(path.read_text(encoding="utf-8"))


def risk_of(methods: list[dict[str, Any]]) -> Risk:
    """The recorded risk of a recipe's methods; the first record whose setting the method shares is taken.

    Args:
        methods: each {method: name, key: value}, with defaults filled in (`MethodConfig.to_dict`).
    """
    ratio: float | None = 1.0
    exact = True
    texts = []
    for method in methods:
        found = next((r for r in _recorded(method["method"]) if _shares(method, r["setting"])), None)
        if found is None:
            ratio, exact = None, False
            texts.append(f"{method['method']}: no recorded result")
            continue
        ratio = None if ratio is None or found["ratio"] is None else ratio * found["ratio"]
        exact = exact and found.get("exact", False)
        texts.append(f"{method['method']}: {found['text']} [{found['from']}]")
    return Risk(ratio=ratio, exact=exact, texts=tuple(texts))


def _shares(method: dict[str, Any], setting: dict[str, Any]) -> bool:
    return all(method.get(key) == value for key, value in setting.items())
