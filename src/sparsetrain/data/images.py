"""Images with labels in the idx format of MNIST and its relatives."""

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsetrain.data.files import check_regular, shown

_MOST_BYTES = 1 << 30
"""Of one file, unpacked."""
FASHION_LABELS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


@dataclass(frozen=True, kw_only=True)
class Images:
    """Two sides, each with `pixel_values` (uint8, n x height x width, or with x 3 for colours) and `labels` (int64, n).

    size: height and width. classes: one more than the largest label, whether or not it was chosen. names: of the
    classes, where they have any.
    """

    train: dict[str, np.ndarray]
    held_out: dict[str, np.ndarray]
    size: tuple[int, int]
    classes: int
    names: tuple[str, ...] = ()
    said: str = ""


def read_images(folder: Path, *, max_rows: int | None, max_eval_rows: int | None, seed: int) -> Images:
    """Grey images from a folder with MNIST's four idx files (`train-images-idx3-ubyte.gz`, ...).

    Args:
        max_rows, max_eval_rows: use this many of each part, chosen by `seed`.

    Raises:
        ValueError: a file is missing, or is not an idx file of the right kind, or the parts do not fit.
    """
    generator = np.random.default_rng(seed)
    sides, largest, size = [], 0, (0, 0)
    for part, prefix, limit in (("train", "train", max_rows), ("eval", "t10k", max_eval_rows)):
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", num_dims=3)
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", num_dims=1)
        if len(images) != len(labels) or not len(images):
            raise ValueError(
                f"{shown(folder)} has {len(images)} {part} images and {len(labels)} labels. Fetch it again."
            )
        if not math.prod(images.shape):
            raise ValueError(f"{shown(folder)} has {part} images without pixels: {images.shape}. Fetch it again.")
        largest, size = max(largest, int(labels.max())), (images.shape[1], images.shape[2])
        kept = generator.permutation(len(images))[:limit]
        sides.append({"pixel_values": images[kept], "labels": labels[kept].astype(np.int64)})
    train, held_out = sides
    return Images(train=train, held_out=held_out, size=size, classes=largest + 1)


def read_idx(path: Path, num_dims: int) -> np.ndarray:
    """A gzipped idx file of bytes as a uint8 array.

    Raises:
        ValueError: the file is missing, is not gzip, or its header does not fit its content.
    """
    if not path.exists():
        raise ValueError(f"{shown(path)} does not exist. Give a folder with MNIST's four .gz files.")
    check_regular(path)
    header_bytes = 4 + 4 * num_dims
    try:
        with gzip.open(path) as file:
            header = file.read(header_bytes)
            if header[:4] != bytes((0, 0, 8, num_dims)) or len(header) < header_bytes:
                raise ValueError(
                    f"{shown(path)} begins with {header[:4]!r}, not as an idx file of bytes with {num_dims} axes."
                )
            shape = struct.unpack(f">{num_dims}I", header[4:])
            if math.prod(shape) > _MOST_BYTES:
                raise ValueError(f"{shown(path)} promises {shape}, more than {_MOST_BYTES:,} bytes. Fetch it again.")
            data = np.frombuffer(file.read(math.prod(shape) + 1), dtype=np.uint8)
            if data.size != math.prod(shape):
                more = " or more" if data.size > math.prod(shape) else ""
                raise ValueError(f"{shown(path)} promises {shape} and holds {data.size} bytes{more}. Fetch it again.")
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{shown(path)} is not a whole gzip file ({error}). Fetch it again.") from error
    return data.reshape(shape)
