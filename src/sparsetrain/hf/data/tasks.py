"""The tasks of long sequences (`sparsetrain.data.tasks`) as `Dataset` objects ready for a trainer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datasets import Dataset

from sparsetrain.data.collate import Collator, PairCollator
from sparsetrain.data.tasks import read_task
from sparsetrain.hf.assets import resolve_data
from sparsetrain.hf.data.bundle import DataBundle


@dataclass(frozen=True, kw_only=True)
class TaskBundle(DataBundle):
    """A `DataBundle` whose tokens are 0 … `vocab_size` - 1, 0 being padding.

    `kind` is `tokens` (rows of `input_ids` and a class) or `pairs` (also `input_ids_b`).
    """

    vocab_size: int
    kind: Literal["tokens", "pairs"] = "tokens"


def load_task(
    name: str,
    *,
    seq_len: int,
    max_rows: int | None = None,
    max_eval_rows: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
) -> TaskBundle:
    """Training and held-out rows of a task; arguments and errors as of `read_task`."""
    found = read_task(
        name,
        seq_len=seq_len,
        max_rows=max_rows,
        max_eval_rows=max_eval_rows,
        seed=seed,
        folder=folder,
        embedded=resolve_data,
    )
    pairs = found.train.second is not None
    return TaskBundle(
        train=Dataset.from_dict(found.train.columns()),
        eval=Dataset.from_dict(found.held_out.columns()),
        collate_fn=PairCollator() if pairs else Collator(0),
        description=found.description,
        counts=found.counts,
        label_names=found.label_names,
        vocab_size=found.vocab_size,
        kind="pairs" if pairs else "tokens",
    )
