"""Data too large to hold: its first rows are read as ever, all others when training comes to them.

The first `stream_rows` of a source (documents, for text) are in memory. Of them are the held-out rows, and what a
conversion, a choice or a plan looks at. Training takes the other rows of these, then the rest of the source in its
order, mixed by a buffer of as many rows; at the end it begins again, in another order. So a stream is a function of the
source and the seed, and a run goes on at its row by reading up to there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

from torch.utils.data import IterableDataset

Encoded = dict[str, Any]


class Stream(IterableDataset):
    """Training rows without an end: `head`, then what `rest()` gives, mixed; then both again.

    Args:
        head: rows in memory; so many are in the buffer from which the next one is drawn.
        rest: makes an iterator of the rows that follow, from their first.
        seed: of the order, with the number of the pass.
        say: told when a pass ends.
    """

    def __init__(
        self,
        head: Any,
        rest: Callable[[], Iterator[Encoded]],
        seed: int,
        say: Callable[[str], object] | None,
    ) -> None:
        self.head, self.rest, self.seed, self.say = head, rest, seed, say

    def __iter__(self) -> Iterator[Encoded]:
        passes = 0
        while True:
            rows = chain(self.head, self.rest())
            count = 0
            for row in mixed(rows, len(self.head), random.Random(f"{self.seed}/{passes}")):
                yield row
                count += 1
            passes += 1
            if self.say is not None:
                self.say(f"The data ended after {count:,} training rows; pass {passes + 1} begins, in another order.")


def mixed(rows: Iterable[Encoded], size: int, draw: random.Random) -> Iterator[Encoded]:
    """Rows in an order drawn from a buffer of `size` of them: no row comes more than `size` - 1 places early."""
    waiting: list[Encoded] = []
    for row in rows:
        if len(waiting) < size:
            waiting.append(row)
            continue
        place = draw.randrange(size)
        yield waiting[place]
        waiting[place] = row
    draw.shuffle(waiting)
    yield from waiting
