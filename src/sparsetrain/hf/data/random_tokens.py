"""Rows of random tokens, for measurements that have no data: their speed and memory are those of any text."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset

from sparsetrain.data.collate import Collator, ImageCollator
from sparsetrain.hf.data.bundle import DataBundle

RANDOM = "random tokens"
"""The `data` of a recipe that is measured without data."""


def random_images(num_rows: int, shape: tuple[int, int, int], seed: int = 0) -> DataBundle:
    """`num_rows` images of random pixels, of (channels, height, width), all with the label 0."""
    channels, height, width = shape
    pixels = np.random.default_rng(seed).integers(0, 256, (num_rows, height, width, channels), dtype=np.uint8)
    return DataBundle(
        train=Dataset.from_dict({"pixel_values": pixels if channels > 1 else pixels[..., 0], "labels": [0] * num_rows}),
        eval=None,
        collate_fn=ImageCollator(),
        description=f"{num_rows} images of random pixels",
        label_names=("0",),
    )


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
