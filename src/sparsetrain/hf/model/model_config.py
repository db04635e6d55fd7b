"""A model's config without transformers: a file, a well-known model of the package, or a name on the hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsetrain.core.config import suggest
from sparsetrain.planner.model_config import ModelConfig

CONFIGS = Path(__file__).parents[1] / "assets" / "configs"


def built_in_configs() -> dict[str, str]:
    """Name -> hub name of the well-known models whose configs come with the package."""
    return {path.stem: json.loads(path.read_text())["_name_or_path"] for path in sorted(CONFIGS.glob("*.json"))}


def read_config(name: str, say: Callable[[str], None] = lambda _line: None) -> ModelConfig:
    """The config of a model: config.json or its folder, an embedded or a well-known model, or a name on the hub.

    Raises:
        ValueError: nothing of that name can be read.
    """
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        return ModelConfig(name=str(path.parent), values=config_values(path), folder=None)
    if (path / "config.json").is_file():
        return ModelConfig(name=name, values=config_values(path / "config.json"), folder=name)
    known = built_in_configs()
    for short, hub in known.items():
        if name.lower() in (short, hub.lower(), hub.lower().rpartition("/")[2]):
            return ModelConfig(name=hub, values=config_values(CONFIGS / f"{short}.json"))
    from sparsetrain.hf.assets import ASSETS, resolve_model

    if name in ASSETS:
        folder = resolve_model(name, progress=say)
        return ModelConfig(name=name, values=config_values(Path(folder) / "config.json"), folder=folder)
    from transformers import AutoConfig

    try:
        return ModelConfig(name=name, values=AutoConfig.from_pretrained(name).to_dict())
    except (OSError, ValueError) as error:
        near = suggest(name.lower(), [*known, *ASSETS])
        names = ", ".join([*known, *ASSETS])
        raise ValueError(
            f"no config for {name!r}.{near} Give a config.json, a model's folder, or one of {names}; "
            f"other names are looked up on the hub ({str(error).splitlines()[0]})"
        ) from None


def config_values(path: Path) -> dict[str, Any]:
    """What a config.json holds.

    Raises:
        ValueError: it cannot be read, or is no model's config.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is no model config: {error}") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError(f"{path} is no model config: it has no model_type.")
    return values


def context_length(config: Any) -> int | None:
    """The most tokens a model takes, or None if its config sets no limit."""
    for name in ("max_position_embeddings", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
