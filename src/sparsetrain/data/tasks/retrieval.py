"""Do two excerpts come from the same file? Byte by byte, on the standard library's sources.

It stands where the Long Range Arena has its paper retrieval (`lra-retrieval` reads that one).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sparsetrain.data.embedded import stdlib_documents
from sparsetrain.data.tasks.rows import BYTES, Embedded, Rows, TaskRows, task_rows

HELD_OUT = 0.1
SHORTEST = 512
"""Bytes below which a file gives no two excerpts."""


def load(*, embedded: Embedded, seq_len: int, max_rows: int | None, max_eval_rows: int | None, seed: int) -> TaskRows:
    """Pairs of excerpts of up to `seq_len` bytes, half of them of one file; a tenth of the files is held out.

    The excerpts of one file never overlap: one lies in its first half, the other in its second.
    """
    documents = stdlib_documents(Path(embedded("python-stdlib")))
    texts = [documents.read(i).encode() for i in range(documents.count)]
    texts = list(dict.fromkeys(text for text in texts if len(text) >= SHORTEST))
    order = np.random.default_rng(0).permutation(len(texts))  # the same files are held out for every seed
    cut = max(2, round(HELD_OUT * len(texts)))
    held_out, train = ([texts[i] for i in part] for part in (order[:cut], order[cut:]))
    return task_rows(
        "retrieval",
        _pairs(train, max_rows or 10_000, seq_len, np.random.default_rng([seed, 1])),
        _pairs(held_out, max_eval_rows or 1_000, seq_len, np.random.default_rng(2)),
        vocab_size=BYTES,
        label_names=("different files", "same file"),
        files=len(texts),
    )


def _pairs(texts: list[bytes], count: int, seq_len: int, generator: np.random.Generator) -> Rows:
    first, second, labels = [], [], []
    for i in range(count):
        a, b = generator.choice(len(texts), 2, replace=False)
        same = i % 2
        first.append(_excerpt(texts[a], 0, seq_len, generator))
        second.append(_excerpt(texts[a if same else b], 1, seq_len, generator))
        labels.append(same)
    return Rows(first, labels, second)


def _excerpt(text: bytes, half: int, seq_len: int, generator: np.random.Generator) -> list[int]:
    size = len(text) // 2
    length = min(seq_len, size)
    start = half * size + int(generator.integers(size - length + 1))
    return [byte + 1 for byte in text[start : start + length]]
