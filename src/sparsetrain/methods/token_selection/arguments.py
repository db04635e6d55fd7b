"""A block's arguments and outputs: as constants, on the selected rows, and their first tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparsetrain.ops.selected_rows import Rows, take_rows
from sparsetrain.surgery.targets import ROWS as DENSE


def detached(given: Any) -> Any:
    """A block's arguments, as constants. What is one already stays the same object, by which layers know it again."""
    if isinstance(given, dict):
        return {name: detached(value) for name, value in given.items()}
    if isinstance(given, (tuple, list)):
        return type(given)(detached(value) for value in given)
    return given.detach() if isinstance(given, Tensor) and given.requires_grad else given


def on_rows(args: tuple, kwargs: dict[str, Any], rows: Rows) -> tuple[tuple, dict[str, Any]]:
    """A block's arguments with the selected rows of every tensor that has one row a token."""
    kwargs = {name: _rows_of(value, rows) for name, value in kwargs.items() if name != DENSE}
    if not args:
        kwargs["hidden_states"] = take_rows(kwargs["hidden_states"], rows)
        return args, kwargs
    return (take_rows(args[0], rows), *(_rows_of(value, rows) for value in args[1:])), kwargs


def _rows_of(value: Any, rows: Rows) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_rows_of(item, rows) for item in value)
    if hasattr(value, "get_seq_length"):  # a cache has its keys from the first pass
        return None
    if not isinstance(value, Tensor) or value.requires_grad or value.ndim < 2:
        return value
    per_token = value.shape[1] == rows.num_tokens and value.shape[0] in (1, rows.shape[0])
    return rows.gather_constant(value) if per_token else value


def first_of(out: Any) -> Tensor:
    return out[0] if isinstance(out, (tuple, list)) else out


def with_first(out: Any, x: Tensor) -> Any:
    return type(out)((x, *out[1:])) if isinstance(out, (tuple, list)) else x
