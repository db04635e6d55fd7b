"""Images with labels in the idx format of MNIST and its relatives, for vision Transformers trained from scratch."""

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from sparsetrain.hf.assets import embedded_name, resolve_data
from sparsetrain.hf.data.bundle import DataBundle

_FASHION_LABELS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


@dataclass(frozen=True)
class ImageCollator:
    """uint8 images (b, height, width) -> `pixel_values` (b, 1, height, width) in [-1, 1], and `labels` (b,)."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = torch.as_tensor(np.asarray([row["pixel_values"] for row in rows], dtype=np.uint8))
        labels = torch.tensor([row["labels"] for row in rows])
        return {"pixel_values": pixels.float().div_(127.5).sub_(1)[:, None], "labels": labels}


def load_images(
    source: str = "fashion-mnist", *, max_rows: int | None = None, max_eval_rows: int | None = None, seed: int = 0
) -> DataBundle:
    """Grey images from a folder with MNIST's four idx files (`train-images-idx3-ubyte.gz`, ...).

    Args:
        source: "fashion-mnist" or such a folder.
        max_rows, max_eval_rows: use this many of each part, chosen by `seed`.

    Raises:
        ValueError: a file is missing, or is not an idx file of the right kind, or the parts do not fit.
    """
    folder = Path(resolve_data(source))
    generator = np.random.default_rng(seed)
    parts, labels_seen = {}, set()
    for part, prefix, limit in (("train", "train", max_rows), ("eval", "t10k", max_eval_rows)):
        images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", num_dims=3)
        labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", num_dims=1)
        if len(images) != len(labels) or not len(images):
            raise ValueError(f"{folder} has {len(images)} {part} images and {len(labels)} labels. Fetch it again.")
        labels_seen.update(labels.tolist())
        chosen = generator.permutation(len(images))[:limit]
        parts[part] = Dataset.from_dict({"pixel_values": images[chosen], "labels": labels[chosen].astype(np.int64)})
    name = embedded_name(source)
    names = _FASHION_LABELS if name == "fashion-mnist" else tuple(str(i) for i in range(max(labels_seen) + 1))
    counts = {"train_rows": len(parts["train"]), "eval_rows": len(parts["eval"])}
    line = f"{counts['train_rows']:,} images of {images.shape[1]}x{images.shape[2]}; held out: {counts['eval_rows']:,}"
    return DataBundle(
        train=parts["train"],
        eval=parts["eval"],
        collate_fn=ImageCollator(),
        description=f"{name or source}: {line}",
        counts=counts,
        label_names=names,
    )


def read_idx(path: Path, num_dims: int) -> np.ndarray:
    """A gzipped idx file of bytes as a uint8 array.

    Raises:
        ValueError: the file is missing, is not gzip, or its header does not fit its content.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Give a folder with MNIST's four .gz files.")
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}). Fetch it again.") from error
    header_bytes = 4 + 4 * num_dims
    if content[:4] != bytes((0, 0, 8, num_dims)) or len(content) < header_bytes:
        raise ValueError(f"{path} begins with {content[:4]!r}, not as an idx file of bytes with {num_dims} axes.")
    shape = struct.unpack(f">{num_dims}I", content[4:header_bytes])
    data = np.frombuffer(content, dtype=np.uint8, offset=header_bytes)
    if data.size != np.prod(shape):
        raise ValueError(f"{path} promises {shape} and holds {data.size} bytes. Fetch it again.")
    return data.reshape(shape)
