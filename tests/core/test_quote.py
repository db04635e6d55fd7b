"""What strangers' files put into our messages."""

from __future__ import annotations

import pytest

from sparsetrain.core.quote import LONGEST, quoted


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "plain"),
        ("naïve 中", "naïve 中"),
        ("\x1b[31mred\n\t\0", "\\x1b[31mred\\n\\t\\x00"),
        ("\ud800", "\\ud800"),
        ("a\u202eb", "a\\u202eb"),
        ({"a": [1]}, "{'a': [1]}"),
        (None, "None"),
    ],
)
def test_what_does_not_print_is_escaped(value: object, shown: str) -> None:
    assert quoted(value) == shown


def test_at_most_two_hundred_characters() -> None:
    assert quoted("x" * LONGEST) == "x" * LONGEST
    for text in ("x" * 10_000_000, "\x1b" * 150, ["y" * 1000]):
        assert len(quoted(text)) == LONGEST and quoted(text).endswith("…")
    assert quoted("abcdef", longest=4) == "abc…"


def test_a_value_too_deep_to_show_is_named_by_its_class() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert quoted(deep) == "<list>"
    while deep:  # taken apart from the outside: the destructor would nest as deep
        deep = deep.pop()  # type: ignore[assignment]
