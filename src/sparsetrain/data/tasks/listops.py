"""ListOps (arXiv 1804.06028) at the lengths of the Long Range Arena: nested lists of digits, ten classes.

`[MAX 4 3 [MIN 2 3 ] 1 0 ]` is 4. Operators: MIN, MAX, MED (the median, rounded down) and SM (the sum modulo 10).
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence

from sparsetrain.data.tasks.rows import Rows, TaskRows, task_rows

OPERATORS: dict[str, Callable[[Sequence[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
TOKENS = {token: i + 1 for i, token in enumerate([*map(str, range(10)), *OPERATORS, "]"])}
"""Token -> id; 0 is padding."""

MAX_DEPTH, MAX_ARGUMENTS = 10, 10
LIST_SHARE = 0.25
"""How often an argument is a list, as in the Long Range Arena's generator."""


class _TooLong(Exception):
    pass


def load(*, seq_len: int, max_rows: int | None, max_eval_rows: int | None, seed: int) -> TaskRows:
    """Expressions of a quarter of `seq_len` to `seq_len` tokens; both sides are drawn apart and share none."""
    train = expressions(max_rows or 10_000, seq_len, seed=f"train {seed}", without=set())
    held_out = expressions(max_eval_rows or 1_000, seq_len, seed="held out", without=set(map(tuple, train.ids)))
    names = [str(i) for i in range(10)]
    return task_rows("listops", train, held_out, vocab_size=len(TOKENS) + 1, label_names=names)


def expressions(count: int, seq_len: int, *, seed: str, without: set[tuple[int, ...]]) -> Rows:
    """`count` different expressions of seq_len/4 … seq_len tokens and their values."""
    generator = random.Random(f"{seed} {seq_len}")
    seen, rows, values = set(without), [], []
    while len(rows) < count:
        tokens: list[int] = []
        try:
            value = _list(generator, tokens, depth=1, room=seq_len)
        except _TooLong:
            continue
        if len(tokens) >= seq_len / 4 and tuple(tokens) not in seen:
            seen.add(tuple(tokens))
            rows.append(tokens)
            values.append(value)
    return Rows(rows, values)


def _list(generator: random.Random, tokens: list[int], depth: int, room: int) -> int:
    """Write a list's tokens, and return its value."""
    name = generator.choice(tuple(OPERATORS))
    tokens.append(TOKENS[name])
    values = []
    for _ in range(generator.randint(2, MAX_ARGUMENTS)):
        if depth < MAX_DEPTH and generator.random() < LIST_SHARE:
            values.append(_list(generator, tokens, depth + 1, room))
        else:
            values.append(generator.randrange(10))
            tokens.append(TOKENS[str(values[-1])])
        if len(tokens) >= room:
            raise _TooLong
    tokens.append(TOKENS["]"])
    return OPERATORS[name](values)
