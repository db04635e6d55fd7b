"""A model's config without transformers: a file, a well-known model of the package, or a name on the hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsetrain.core.config import suggest
from sparsetrain.planner.config_values import config_values
from sparsetrain.planner.model_config import ModelConfig, usable_positions
from sparsetrain.runs.layout import model_of

CONFIGS = Path(__file__).parents[1] / "assets" / "configs"


def built_in_configs() -> dict[str, str]:
    """Name -> hub name of the well-known models whose configs come with the package."""
    return {path.stem: json.loads(path.read_text())["_name_or_path"] for path in sorted(CONFIGS.glob("*.json"))}


def read_config(name: str, say: Callable[[str], None] = lambda _line: None) -> ModelConfig:
    """The config of a model: config.json or its folder, an embedded or a well-known model, or a name on the hub.

    Raises:
        ValueError: nothing of that name can be read.
    """
    name = model_of(name)
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        name = str(path.parent if path.name == "config.json" else path)
        return ModelConfig(name=name, values=config_values(path), folder=None)
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
    from sparsetrain.hf.model.opening import open_config

    try:
        return ModelConfig(name=name, values=open_config(name).to_dict())
    except ValueError as error:
        if "code" in str(error) or path.is_dir():
            raise
        near = suggest(name.lower(), [*known, *ASSETS])
        names = ", ".join([*known, *ASSETS])
        raise ValueError(
            f"no config for {name!r}.{near} Give a config.json, a model's folder, or one of {names}; "
            f"other names are looked up on the hub ({str(error).splitlines()[0]})"
        ) from None


def context_length(config: Any) -> int | None:
    """The most tokens a model takes, or None if its config sets no limit."""
    return usable_positions(config.get_text_config().to_dict())


def check_context(seq_len: int, config: Any, name: str) -> None:
    """Raise ValueError if rows of `seq_len` tokens are longer than a model takes."""
    context = context_length(config)
    if context is not None and seq_len > context:
        raise ValueError(f"seq_len={seq_len} is longer than the context of {name}, {context:,} tokens. Lower it.")
