"""Images as sequences of grey values: Fashion-MNIST row by row, and CIFAR-10 for those who have its files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from sparsetrain.data.files import check_regular, shown
from sparsetrain.data.images import FASHION_LABELS, read_images
from sparsetrain.data.tasks.rows import BYTES, Embedded, Rows, TaskRows, chosen, task_rows

SIDE = 28
CIFAR_SIDE = 32
CIFAR_RECORD = 1 + 3 * CIFAR_SIDE**2
_MOST_RECORDS = 100_000
GREY = np.array([0.2989, 0.587, 0.114])
"""Weights of red, green and blue (ITU-R BT.601)."""


def load(*, embedded: Embedded, seq_len: int, max_rows: int | None, max_eval_rows: int | None, seed: int) -> TaskRows:
    """Fashion-MNIST as 784 tokens; at 196 or 49, each token is the mean of 2 x 2 or 4 x 4 pixels.

    Raises:
        ValueError: another `seq_len`.
    """
    side = math.isqrt(seq_len)
    if side * side != seq_len or side not in (28, 14, 7):
        raise ValueError(
            f"pixels: seq_len={seq_len}. An image has 784 pixels: use 784, or 196 or 49 for means of them."
        )
    images = read_images(Path(embedded("fashion-mnist")), max_rows=max_rows, max_eval_rows=max_eval_rows, seed=seed)
    sides = [
        Rows(_tokens(part["pixel_values"], SIDE // side), part["labels"].tolist())
        for part in (images.train, images.held_out)
    ]
    return task_rows("pixels", *sides, vocab_size=BYTES, label_names=FASHION_LABELS)


def _tokens(images_nhw: np.ndarray, factor: int) -> np.ndarray:
    n, h, w = images_nhw.shape
    means = images_nhw.reshape(n, h // factor, factor, w // factor, factor).mean(axis=(2, 4))
    return means.round().astype(np.int64).reshape(n, -1) + 1


def load_cifar(*, folder: Path, seq_len: int, max_rows: int | None, max_eval_rows: int | None, seed: int) -> TaskRows:
    """CIFAR-10 in grey as 1,024 tokens, from the binary version (`data_batch_1.bin` …, `test_batch.bin`).

    The Python version holds pickles and is not read.

    Raises:
        ValueError: another `seq_len`; a file that is missing or of a wrong size.
    """
    if seq_len != CIFAR_SIDE**2:
        raise ValueError(f"lra-image: seq_len={seq_len}. A CIFAR-10 image has 1,024 pixels: use 1024.")
    generator = np.random.default_rng(seed)
    sides = []
    for names, limit in (
        ([f"data_batch_{i}.bin" for i in range(1, 6)], max_rows),
        (["test_batch.bin"], max_eval_rows),
    ):
        records = np.concatenate([_records(folder / name) for name in names])
        records = records[chosen(len(records), limit, generator)]
        grey = np.tensordot(records[:, 1:].reshape(-1, 3, CIFAR_SIDE**2), GREY, axes=(1, 0))
        sides.append(Rows(grey.round().astype(np.int64) + 1, records[:, 0].tolist()))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    return task_rows("lra-image", *sides, vocab_size=BYTES, label_names=names)


def _records(path: Path) -> np.ndarray:
    if not path.exists():
        raise ValueError(
            f"{shown(path)} does not exist. lra-image reads the binary version of CIFAR-10 (data_batch_1.bin …, "
            "test_batch.bin); the Python version holds pickles, which are not loaded."
        )
    if check_regular(path).st_size > _MOST_RECORDS * CIFAR_RECORD:
        raise ValueError(
            f"{shown(path)} has more than {_MOST_RECORDS:,} images. CIFAR-10 has 10,000 a file; fetch it again."
        )
    content = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    if not content.size or content.size % CIFAR_RECORD:
        raise ValueError(
            f"{shown(path)} has {content.size} bytes, no multiple of a record's {CIFAR_RECORD}. Fetch it again."
        )
    records = content.reshape(-1, CIFAR_RECORD)
    if records[:, 0].max() > 9:
        raise ValueError(f"{shown(path)} has a label {records[:, 0].max()}; CIFAR-10 has 0 to 9. Is it CIFAR-100?")
    return records
