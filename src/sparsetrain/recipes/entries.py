"""Methods as a recipe's file or flags write them: `{method: name, key: value}` or 'name:key=value,key=value'."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from sparsetrain.core.config import MethodConfig, lists_for_tuples, method_config


def read_methods(given: Any) -> tuple[MethodConfig, ...]:
    """The configs of a recipe's `methods`.

    Args:
        given: a list or tuple of configs, mappings or strings.

    Raises:
        ValueError: another type; an unknown method or key; a value of the wrong type or out of range.
    """
    if not isinstance(given, list | tuple):
        raise ValueError(f"methods is {given!r}. Give a list of {{method: name, ...}}.")
    return tuple(entry if isinstance(entry, MethodConfig) else _read(entry) for entry in given)


def _read(entry: Any) -> MethodConfig:
    values = parse_method(entry) if isinstance(entry, str) else entry
    if not isinstance(values, Mapping):
        raise ValueError(f"methods holds {values!r}. Give {{method: name, ...}} or 'name:key=value,...'.")
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
    hints, common = get_type_hints(kind), {field.name for field in dataclasses.fields(MethodConfig)}
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
        ValueError: an entry without `=`.
    """
    name, _, rest = text.partition(":")
    found: dict[str, Any] = {"method": name.strip()}
    for entry in filter(None, (part.strip() for part in rest.split(","))):
        key, equals, value = entry.partition("=")
        if not equals:
            raise ValueError(f"method {text!r}: {entry!r} has no '='. Write {name}:key=value,key=value.")
        found[key.strip()] = value.strip()
    return found


def _typed(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry with its strings read as what the config's fields hold; unknown keys are left for `from_dict`."""
    hints = get_type_hints(method_config(entry.get("method")))
    return {
        key: _value(f"{entry.get('method')}: {key}", hints[key], value) if key in hints else value
        for key, value in entry.items()
    }


def _value(what: str, hint: Any, value: Any) -> Any:
    """One config value of a type: int, float, bool, str, tuple[int, ...], tuple[str, ...], or one of them or None."""
    kinds = [kind for kind in get_args(hint) or [hint] if kind is not NoneType]
    kind = kinds[0] if get_origin(hint) is not tuple else hint
    if kind is str:  # "none" is a choice of some
        return value
    try:
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            if NoneType not in get_args(hint):
                raise ValueError
            return None
        return _of_kind(kind, value)
    except (ValueError, KeyError, TypeError, ZeroDivisionError, OverflowError):
        raise ValueError(f"{what}={value!r} is not of type {_name(hint)}.") from None


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def _of_kind(kind: Any, value: Any) -> Any:
    if get_origin(kind) is tuple and get_args(kind)[0] is str:
        return value.split("|") if isinstance(value, str) else [str(item) for item in value]
    if get_origin(kind) is tuple:
        return _indices(value) if isinstance(value, str) else [int(item) for item in value]
    if kind is bool:
        return value if isinstance(value, bool) else {"true": True, "false": False}[str(value).lower()]
    if kind not in (int, float):
        return value
    if isinstance(value, bool):
        raise ValueError
    if kind is float:
        above, slash, below = str(value).partition("/")
        return float(above) / float(below) if slash else float(above)
    if float(value) != int(float(value)):
        raise ValueError
    return int(float(value))


def _indices(text: str) -> list[int]:
    """'2|4-6' -> [2, 4, 5, 6]"""
    found: list[int] = []
    for part in text.split("|"):
        first, dash, last = part.partition("-")
        found.extend(range(int(first), int(last) + 1) if dash else [int(first)])
    return found
