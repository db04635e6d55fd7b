"""Recipe files as plain values: one regular file of YAML, small, flat, without aliases, every key once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sparsetrain.core.fields import shown
from sparsetrain.core.plain_files import regular_file
from sparsetrain.core.quote import quoted

MOST_BYTES = 2**18
DEEPEST = 12


class _Plain(yaml.SafeLoader):
    """YAML without what can surprise or explode: an alias, a key given twice, a deep nest."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise _problem(self.peek_event(), "an alias (*name) is not taken here; write the value out")
        if self.depth >= DEEPEST:
            raise _problem(self.peek_event(), f"values nest deeper than {DEEPEST} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        found: set[Any] = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in found:
                raise _problem(key, f"the key {shown(key.value)} is given twice; give it once")
            found.add(name)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """The plain values of a YAML text.

    Raises:
        ValueError: it is none, or has what is not taken here; the message names the line.
    """
    try:
        return yaml.load(text, _Plain)
    except yaml.YAMLError as error:
        raise ValueError(f"it is not valid YAML: {quoted(' '.join(str(error).split()), 400)}") from None
    except (ValueError, OverflowError) as error:  # a date or a number that does not exist
        raise ValueError(f"it holds a value that cannot be read: {quoted(str(error))}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The `key: value` lines of a recipe file.

    Raises:
        ValueError: no regular file, too large, no UTF-8, not YAML, no mapping.
    """
    regular_file(path, MOST_BYTES, may_be_empty=True)
    try:
        values = read_yaml(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8") from None
    if not isinstance(values, dict):
        raise ValueError(f"it holds {type(values).__name__}, not `key: value` lines")
    if strange := [key for key in values if not isinstance(key, str)]:
        raise ValueError(f"its key {shown(strange[0])} is no name. Quote it, or correct the line")
    return values


def _problem(place: Any, what: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, what, place.start_mark)
