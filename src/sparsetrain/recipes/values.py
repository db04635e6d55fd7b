"""What a recipe's key may hold, beyond pydantic's types, and its errors in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from sparsetrain.core.fields import shown


def check_plain(key: str, value: Any, annotation: Any) -> None:
    """Raise ValueError for what pydantic would take, and nobody means: true for a number, text that is no file's name.

    Bytes of an argument that are no text come as lone surrogates, and could not be written into recipe.yaml.
    """
    if isinstance(value, bytes):
        raise ValueError(f"{key}={shown(value)}: that is binary. Give {_takes(annotation)}.")
    if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
        raise ValueError(f"{key}={str(value).lower()}: that is no value of this key. Give {_takes(annotation)}.")
    if isinstance(value, str) and (
        not value.strip() or "\0" in value or value != value.encode(errors="ignore").decode()
    ):
        problem = "it is empty" if not value.strip() else "it holds characters that are no text"
        raise ValueError(f"{key}={shown(value)}: {problem}. Give {_takes(annotation)}.")


def _takes(annotation: Any) -> str:
    kinds = get_args(annotation) or (annotation,)
    says = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    found = [says[kind] for kind in kinds if kind in says] or [str(kind) for kind in kinds if isinstance(kind, str)]
    return " or ".join(found) or "what `--help` says"


def problem_of(entry: Any) -> tuple[str, str]:
    """(the key and what was found, what is allowed) for one of pydantic's errors."""
    message = str(entry["msg"])
    if entry["type"] == "value_error":
        return "", message.removeprefix("Value error, ")
    key = str(entry["loc"][0])
    if entry["type"] == "missing":
        return f"{key} is missing. ", f"Give it in the recipe file or as --{key.replace('_', '-')}."
    return f"{key}={shown(entry['input'])}: ", f"{message[0].lower()}{message[1:]}"


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """`training_values` with one key a config key: methods.0.<name>.<key>."""
    methods = values.get("methods") or []
    found = {**values, "methods": [entry["method"] for entry in methods]}
    for i, entry in enumerate(methods):
        found |= {f"methods.{i}.{entry['method']}.{key}": value for key, value in entry.items() if key != "method"}
    return found
