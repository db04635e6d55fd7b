"""The one door to transformers' loaders of configs and tokenizers: no code of a model runs unless the user has said so
(`trust`), and every fault is a line.

`trust_remote_code` is passed to every loader, here and in `weights`: left out, transformers asks on stdin. A config of
code that ran keeps its `auto_map`, which no other config has (`code_of`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.utils import logging

from sparsetrain.core.config import suggest
from sparsetrain.core.plain_files import read_plain_object
from sparsetrain.core.quote import quoted
from sparsetrain.hf.model.diffusion_config import DiffusionConfig
from sparsetrain.planner.config_values import MOST_BYTES, check_values, config_values
from sparsetrain.runs.folders import check_folder
from sparsetrain.runs.layout import ADAPTER, SAVED_PLACES

NO_CODE = {"trust_remote_code": False}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt",
                    "spiece.model", "sentencepiece.bpe.model", "tekken.json")  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' progress bars and load reports, which tear our bar and fill logs. Also a decorator."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


@quiet()
def open_config(path: str, name: str | None = None, *, trust: bool = False) -> Any:
    """The config of a model's folder or hub name, checked; it chooses no attention, whatever it says.

    Args:
        name: what the user called it, for messages.
        trust: Python code that comes with the model may run.

    Raises:
        ValueError: there is none, it is damaged, its sizes are none, or it needs code that comes with the model.
    """
    folder, name = Path(path), name or path
    if folder.is_dir():
        check_folder(folder)
        if (folder / "config.json").exists():
            values = config_values(folder / "config.json")
            if values["model_type"] == DiffusionConfig.model_type:
                return make_config(values | {"name_or_path": path}, name)
    elif name == path:
        check_place(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    except Exception as error:  # the hub client and the config classes raise a dozen kinds, and their code any
        raise ValueError(model_not_found(name, error)) from None
    check_values(config.to_dict(), name)
    return _with_our_attention(config) if trust else _without_code(config)


def code_of(config: Any) -> dict[str, bool]:
    """What a loader is told of running a model's code: True for a config that was opened with trust and names code."""
    return {"trust_remote_code": bool(getattr(config, "auto_map", None))}


def check_place(name: str) -> None:
    """Raise ValueError if a name that is no folder stands in one that exists: it is a path, and none of the hub's."""
    path = Path(name)
    if len(path.parts) > 1 and path.parent.is_dir() and not path.exists():
        there = sorted(other.name for other in path.parent.iterdir() if other.is_dir())
        held = f"{', '.join(map(quoted, there[:8])) or 'no folder'}{' …' if there[8:] else ''}"
        raise ValueError(
            f"model {quoted(name)!r} is not an embedded asset, not a local folder, and not asked of the hub, because "
            f"the folder {quoted(str(path.parent))} exists.{suggest(path.name, there)} It holds {held}. Check the "
            "name; for a model of the hub, start elsewhere."
        )


@quiet()
def make_config(values: dict[str, Any], name: str) -> Any:
    """A config of transformers from plain values that were checked.

    Raises:
        ValueError: no such family, or values that it cannot be made of.
    """
    kind = values.get("model_type")
    try:
        config = AutoConfig.for_model(**values)
    except Exception as error:  # each family checks its values in a way of its own
        if "Unrecognized model identifier" in str(error):
            raise ValueError(_unknown_type(name, kind)) from None
        raise ValueError(f"the config of {quoted(name)} ({quoted(kind)}) cannot be used: {told(error)}") from None
    return _without_code(config)


@quiet()
def open_tokenizer(place: str | Path, name: str | None = None, *, trust: bool = False) -> Any:
    """The tokenizer of a folder or hub name; trust: Python code that comes with it may run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or needs code that comes with it.
    """
    folder, name = Path(place), quoted(name or str(place))
    if folder.is_dir():
        check_folder(folder)
        if not any((folder / file).exists() for file in _TOKENIZER_FILES):
            raise FileNotFoundError(f"{name} holds no tokenizer (tokenizer.json). Save one into it.")
        _check_tokenizer_configs(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(place), trust_remote_code=trust)
        tokenizer("a")  # some that load cannot read a letter
    except BaseException as error:  # the reader in Rust panics with an exception that is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        if _needs_code(error):
            raise ValueError(model_not_found(name, error)) from None
        raise ValueError(f"the tokenizer of {name} cannot be read: {told(error)}") from None
    return tokenizer


@quiet()
def open_image_processor(place: str | Path, config: Any) -> Any:
    """What prepares pictures for a model; None where its files do not say.

    Raises:
        ValueError: it is damaged, or needs code that comes with it.
    """
    folder = Path(place)
    if folder.is_dir() and not (folder / "preprocessor_config.json").exists():
        return None
    try:
        return AutoImageProcessor.from_pretrained(str(place), config=config, backend="pil", **NO_CODE)
    except Exception as error:  # the hub client and each processor have a dozen kinds
        raise ValueError(f"the image processor of {quoted(str(place))} cannot be read: {told(error)}") from None


def model_not_found(name: str, error: BaseException) -> str:
    """The message for a model that transformers could not load."""
    shown = quoted(name)
    if _needs_code(error):
        return (
            f"{shown} needs Python code that comes with it, which is run with --trust-remote-code alone (in Python: "
            "trust_remote_code=True). Read that code before, or use a model of a family that transformers has."
        )
    if any(Path(name, place).is_dir() for place in SAVED_PLACES if place.endswith(ADAPTER)):
        return (
            f"{shown} is a run that left an adapter, and a whole model was asked for. Run: sparsetrain export {shown} "
            "--output DIR; and name DIR."
        )
    if Path(name).is_dir():
        return f"{shown} holds no model that can be read: {told(error)}"
    return (
        f"model {shown!r} is not an embedded asset, not a local folder, and could not be had from the hub "
        f"({told(error).rstrip('.')}). Check the name, or see `sparsetrain models list`."
    )


def told(error: BaseException) -> str:
    """A library's error as part of a line: its last line that says something (the first names a class only)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    chosen = "" if not lines else lines[-1] if lines[0].endswith(":") else lines[0]
    kind = "" if isinstance(error, ValueError | OSError) and chosen else f"{type(error).__name__}: "
    line = f"{kind}{quoted(chosen)}".removesuffix(": ")
    return line if line.endswith((".", "!", "?", "…")) else f"{line}."


def _needs_code(error: BaseException) -> bool:
    return "trust_remote_code" in str(error) or "custom code" in str(error)


def _without_code(config: Any) -> Any:
    for inner in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if inner is not None and getattr(inner, "auto_map", None):
            del inner.auto_map
    return _with_our_attention(config)


def _with_our_attention(config: Any) -> Any:
    config._attn_implementation = None
    for inner in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if inner is not None:
            inner._experts_implementation = None
    return config


def _check_tokenizer_configs(folder: Path) -> None:
    """Refuse sizes that are none, and a class that is no tokenizer: transformers would load it, asking for code."""
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        if not path.exists():
            continue
        values = read_plain_object(path, MOST_BYTES)
        check_values(values, str(path))
        kind = values.get("tokenizer_class")
        if kind is not None and not _may_be_tokenizer(kind):
            raise ValueError(f"{quoted(str(path))}: tokenizer_class={quoted(kind)} is no tokenizer. It is damaged.")
        if not isinstance(values.get("chat_template"), str | list | dict | None):
            raise ValueError(f"{quoted(str(path))}: chat_template is no text. It is damaged.")


def _may_be_tokenizer(name: object) -> bool:
    """A class that transformers does not have is no harm: it takes another one then."""
    if not isinstance(name, str):
        return False
    found = getattr(transformers, name, None) if name.isidentifier() else None
    return found is None or (isinstance(found, type) and issubclass(found, transformers.PreTrainedTokenizerBase))


def _unknown_type(name: str, kind: object) -> str:
    return (
        f"{quoted(name)} is of a family that this transformers does not know (model_type {quoted(kind)}). It needs a "
        "newer transformers, or Python code that comes with it, which is run with --trust-remote-code alone."
    )
