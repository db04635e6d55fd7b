"""Foreign text inside a message: short, on one line, without control characters."""

from __future__ import annotations

LONGEST = 200


def quoted(value: object, longest: int = LONGEST) -> str:
    """`value` as a message may show it: at most `longest` characters, what does not print as an escape.

    Terminal sequences, line breaks, lone surrogates and direction marks come out as `\\x1b`, `\\n`, `\\ud800`; a longer
    text ends in `…`. Only the part that is shown is looked at, so megabytes cost nothing.

    Args:
        value: text, as it is; anything else by its `repr`. One whose `repr` fails is named by its class.
    """
    text = value if isinstance(value, str) else _repr(value)
    shown = "".join(_printable(character) for character in text[: longest + 1])
    if len(text) <= longest and len(shown) <= longest:
        return shown
    return shown[: longest - 1] + "…"


def _printable(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]


def _repr(value: object) -> str:
    try:
        return repr(value)
    except (RecursionError, MemoryError, ValueError):
        return f"<{type(value).__name__}>"
