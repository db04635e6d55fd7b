"""Held-out rows as prompts: what comes before the first words to be learnt, and these words."""

from __future__ import annotations

from collections.abc import Sequence

from sparsetrain.data.collate import IGNORED_LABEL

TEXT_PROMPT_TOKENS = 128
"""Tokens of a prompt cut out of plain text, at most half of its row."""


def prompt_of(ids: Sequence[int], labels: Sequence[int], most: int) -> tuple[list[int], list[int]]:
    """(prompt, reference) of a row: up to its first target, and the targets from there on, at most `most`.

    A row whose tokens are all targets is plain text, and is cut after `TEXT_PROMPT_TOKENS`.
    """
    targets = [t for t, label in enumerate(labels) if label != IGNORED_LABEL]
    begin = targets[0] if targets else len(ids)
    if begin <= 1:  # the first token is never predicted
        begin = min(TEXT_PROMPT_TOKENS, len(ids) // 2)
    end = next((t for t in range(begin, len(ids)) if labels[t] == IGNORED_LABEL), len(ids))
    return list(ids[:begin]), list(ids[begin : min(end, begin + most)])


def spread(num_rows: int, count: int) -> list[int]:
    """`count` places that are evenly spaced over the rows, so that nobody has chosen them."""
    count = min(count, num_rows)
    return [i * num_rows // count for i in range(count)]
