"""What a config's fields may hold, by their type hints: plain values, and what to say of any other."""

from __future__ import annotations

import math
import operator
from functools import cache
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from sparsetrain.core.quote import quoted

MOST = 4096
"""Entries that a list may have: a range such as 0-99999999999 is refused before it is written out."""
LARGEST = 2**63 - 1
_SAYS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}


def shown(value: Any) -> str:
    """A value as messages quote it: text in quotes, everything short and printable."""
    return quoted(repr(value[:300]) if isinstance(value, str) else value)


@cache
def field_hints(kind: type) -> dict[str, Any]:
    """Field name -> type hint."""
    return get_type_hints(kind)


def accepted(hint: Any) -> str:
    """A hint in words: 'a whole number, or none'."""
    kind = kind_of(hint)
    if get_origin(kind) is tuple:
        words = "a list of whole numbers from 0 on" if get_args(kind)[0] is int else "text or a list of texts"
    else:
        words = _SAYS.get(kind, str(kind))
    return f"{words}, or none" if NoneType in get_args(hint) else words


def kind_of(hint: Any) -> Any:
    """The hint without its None: int, float, bool, str, tuple[int, ...], …"""
    if get_origin(hint) is tuple:
        return hint
    kinds = [kind for kind in get_args(hint) or [hint] if kind is not NoneType]
    return kinds[0] if len(kinds) == 1 else hint


def checked(what: str, hint: Any, value: Any) -> Any:
    """The value of a field, lists as tuples; a hint of another kind than those here takes anything.

    Raises:
        ValueError: a value of another type, or a number that is not finite; the message says what is taken.
    """
    kind = kind_of(hint)
    if value is None and NoneType in get_args(hint):
        return None
    try:
        return _of_kind(kind, value)
    except (TypeError, OverflowError):
        raise ValueError(f"{what}={shown(value)} is not taken. Give {accepted(hint)}.") from None


def _of_kind(kind: Any, value: Any) -> Any:
    if get_origin(kind) is tuple and get_args(kind)[0] in (int, str):
        entry = get_args(kind)[0]
        if isinstance(value, entry) and not isinstance(value, bool):
            value = (value,)
        if not isinstance(value, list | tuple) or len(value) > MOST:
            raise TypeError
        return tuple(_of_kind(entry, item) for item in value)
    if kind in (int, float) and isinstance(value, bool):
        raise TypeError
    if kind is int and abs(operator.index(value)) > LARGEST:
        raise OverflowError
    if kind is float and not math.isfinite(value):
        raise TypeError
    if kind in (bool, str) and not isinstance(value, kind):
        raise TypeError
    return value
