"""Regular expressions of strangers: only those whose time on a short text is bounded."""

from __future__ import annotations

import re

from sparsetrain.core.quote import quoted

_MOST_LETTERS = 1_000


def check_pattern(pattern: str, where: str) -> None:
    """Raise ValueError if a regular expression is none, or may take long on a module's name.

    Taken are those without a repeated group, back reference or look-around, with few repeats and few groups of
    alternatives: their time grows with a small power of the length, and names are short.
    """
    plain = re.sub(r"\\.|\[[^\]]*\]", lambda found: "\\1" if re.match(r"\\\d", found[0]) else "x", pattern)
    groups = plain.replace("(?:", "(")
    faults = {
        f"it has {len(pattern):,} letters": len(pattern) > _MOST_LETTERS,
        "a group is repeated": re.search(r"\)[*+{]", plain),
        "it refers back or looks around": "\\1" in plain or "(?" in groups,
        "it has more than 4 repeats": len(re.findall(r"[*+]|\{", plain)) > 4,
        "it has more than 8 optional parts": len(re.findall(r"(?<![*+}(])\?", plain)) > 8,
        "it has more than 3 groups of alternatives": len(re.findall(r"\([^()]*\|", groups)) > 3,
    }
    reason = next((reason for reason, fault in faults.items() if fault), None)
    try:
        if reason is None:
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        reason = str(error)
    if reason is not None:
        raise ValueError(
            f"{quoted(where)}: the pattern {quoted(repr(pattern), 80)} is refused: {quoted(reason)}. Name the modules "
            "one by one instead."
        )
