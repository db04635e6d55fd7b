"""Methods as a recipe's file or flags write them: `{method: name, key: value}` or 'name:key=value,key=value'."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args, get_origin

import sparsetrain.methods  # noqa: F401  (enters them in the registry)
from sparsetrain.core.config import MethodConfig, lists_for_tuples, method_config
from sparsetrain.core.fields import MOST, accepted, field_hints, kind_of, shown
from sparsetrain.core.quote import quoted


def read_methods(given: Any) -> tuple[MethodConfig, ...]:
    """The configs of a recipe's `methods`.

    Args:
        given: a list or tuple of configs, mappings or strings.

    Raises:
        ValueError: another type; an unknown method or key; a value of the wrong type or out of range.
    """
    if not isinstance(given, list | tuple):
        raise ValueError(f"methods is {shown(given)}. Give a list of {{method: name, ...}}.")
    return tuple(entry if isinstance(entry, MethodConfig) else _read(entry) for entry in given)


def _read(entry: Any) -> MethodConfig:
    values = parse_method(entry) if isinstance(entry, str) else entry
    if not isinstance(values, Mapping):
        raise ValueError(f"methods holds {shown(values)}. Give {{method: name, ...}} or 'name:key=value,...'.")
    return MethodConfig.from_dict(_typed(values))


def short_entry(config: MethodConfig) -> dict[str, Any]:
    """What differs from the config's defaults, so that recipe files stay readable."""
    defaults = type(config)().to_dict()
    given = {key: value for key, value in config.to_dict().items() if value != defaults[key]}
    return {"method": config.method, **lists_for_tuples(given)}


def written_defaults(kind: type[MethodConfig]) -> str:
    """A method with its defaults, as `--method` takes it: 'name:keep_ratio=0.3,always_keep=first,num_tokens=none'.

    Keys that every method has are left out, and choices that are not made (None where a word is expected).
    """
    hints, common = field_hints(kind), {field.name for field in dataclasses.fields(MethodConfig)}
    values = {key: value for key, value in kind().to_dict().items() if key not in common | {"method"}}
    texts = [
        _written(key, value) for key, value in values.items() if value is not None or str not in get_args(hints[key])
    ]
    return f"{kind.method}:{','.join(texts)}"


def _written(key: str, value: Any) -> str:
    if isinstance(value, tuple):
        value = "|".join(map(str, value))
    return f"{key}={str(value).lower() if value is None or isinstance(value, bool) else value}"


def parse_method(text: str) -> dict[str, Any]:
    """'name:num_blocks=16,layers=2|4-9' -> {"method": "name", "num_blocks": "16", "layers": "2|4-9"}.

    Raises:
        ValueError: an entry without `=`, or a key that is given twice.
    """
    name, _, rest = text.partition(":")
    found: dict[str, Any] = {"method": name.strip()}
    for entry in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = (part.strip() for part in entry.partition("="))
        if not equals:
            raise ValueError(
                f"method {shown(text)}: {shown(entry)} has no '='. Write {quoted(name)}:key=value,key=value."
            )
        if key in found:
            raise ValueError(f"method {shown(text)}: {shown(key)} is given twice. Give it once.")
        found[key] = value
    return found


def _typed(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry with its strings read as what the config's fields hold; the config checks all else."""
    hints = field_hints(method_config(entry.get("method")))
    return {
        key: _value(f"{entry.get('method')}: {key}", hints[key], value) if key in hints else value
        for key, value in entry.items()
    }


def _value(what: str, hint: Any, value: Any) -> Any:
    """One config value of a type: int, float, bool, str, tuple[int, ...], tuple[str, ...], or one of them or None."""
    kind = kind_of(hint)
    if kind is str:  # "none" is a choice of some
        return value
    if isinstance(value, str) and value.lower() in ("none", "null"):
        value = None
    try:
        return _of_kind(kind, value)
    except (ValueError, KeyError, ZeroDivisionError, OverflowError):
        of = kind.__name__ if isinstance(kind, type) else str(kind)
        raise ValueError(f"{what}={shown(value)} is not of type {of}. Give {accepted(hint)}.") from None


def _of_kind(kind: Any, value: Any) -> Any:
    """Text and whole floats (4.0) as the kind they stand for; other values are left as they are."""
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        return [_of_kind(get_args(kind)[0], item) for item in value]
    if get_origin(kind) is tuple and isinstance(value, str):
        return (value.split("|") if get_args(kind)[0] is str else _indices(value)) if value else []
    if kind is bool and isinstance(value, str):
        return {"true": True, "false": False}[value.lower()]
    if kind is float and isinstance(value, str):
        above, slash, below = value.partition("/")
        return float(above) / float(below) if slash else float(above)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, str | float):
        number = int(value) if isinstance(value, str) and value.strip().lstrip("+-").isdigit() else float(value)
        if number != int(number):
            raise ValueError
        return int(number)
    return value


def _indices(text: str) -> list[int]:
    """'2|4-6' -> [2, 4, 5, 6]"""
    found: list[int] = []
    for part in text.split("|"):
        first, dash, last = part.partition("-")
        begin, end = int(first), int(last if dash else first)
        if not begin <= end < MOST:  # before a range is written out
            raise ValueError
        found.extend(range(begin, end + 1))
    return found
