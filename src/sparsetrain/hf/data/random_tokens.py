"""Rows of random tokens, for measurements that have no data: their speed and memory are those of any text."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset

from sparsetrain.data.collate import Collator
from sparsetrain.hf.data.bundle import DataBundle

RANDOM = "random tokens"
"""The `data` of a recipe that is measured without data."""


def random_rows(num_rows: int, seq_len: int, vocab_size: int, *, classify: bool, seed: int = 0) -> DataBundle:
    """`num_rows` full rows of uniformly drawn tokens; with `classify`, each has one of two labels.

    Every row is as long as it can be, so a measurement is that of the longest batch.
    """
    generator = torch.Generator().manual_seed(seed)
    ids_rt = torch.randint(0, vocab_size, (num_rows, seq_len), generator=generator)
    columns: dict[str, Any] = {"input_ids": ids_rt.tolist()}
    columns["labels"] = [i % 2 for i in range(num_rows)] if classify else ids_rt.tolist()
    return DataBundle(
        train=Dataset.from_dict(columns),
        eval=None,
        collate_fn=Collator(pad_token_id=0, attention_mask=classify),
        description=f"{num_rows} rows of {seq_len:,} random tokens",
        label_names=("0", "1") if classify else (),
    )
