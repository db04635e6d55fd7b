"""Images with labels: MNIST's idx files, a folder of pictures, digits, or a data set of `datasets`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset, load_from_disk

from sparsetrain.core.quote import quoted
from sparsetrain.data.collate import ImageCollator
from sparsetrain.data.images import FASHION_LABELS, Images, read_images
from sparsetrain.data.pictures import DIGITS, SUFFIXES, as_pixels, has_pictures, read_digits, read_pictures, split
from sparsetrain.data.processors import normalisation, prepared
from sparsetrain.hf.assets import embedded_name, resolve_data
from sparsetrain.hf.data.bundle import DataBundle


def load_images(
    source: str = "fashion-mnist",
    *,
    max_rows: int | None = None,
    max_eval_rows: int | None = None,
    seed: int = 0,
    processor: Any = None,
    channels: int = 3,
) -> DataBundle:
    """Images from "fashion-mnist", "digits", a folder with MNIST's files, a folder of pictures (a class a subfolder),
    or a data set of `datasets`: a folder that it saved, or a name on the hub.

    Args:
        max_rows, max_eval_rows: use this many of each part, chosen by `seed`.
        processor: the image processor of a trained model, by which pictures are scaled, cut and normalised.
        channels: that model's.

    Raises:
        ValueError: nothing of the kind is there, or as `read_images` and `read_pictures`.
    """
    prepare = None if processor is None else partial(prepared, processor, channels)
    found = _read(source, prepare, max_rows=max_rows, max_eval_rows=max_eval_rows, seed=seed)
    train, held_out = Dataset.from_dict(found.train), Dataset.from_dict(found.held_out)
    if processor is not None:  # as lists, a picture of 224 x 224 takes 10 ms
        train, held_out = train.with_format("numpy"), held_out.with_format("numpy")
    name = embedded_name(source)
    names = FASHION_LABELS if name == "fashion-mnist" else found.names
    height, width = found.size
    return DataBundle(
        train=train,
        eval=held_out,
        collate_fn=ImageCollator(*normalisation(processor)),
        description=f"{name or source}: {len(train):,} images of {height}x{width}; held out: {len(held_out):,}",
        counts={"train_rows": len(train), "eval_rows": len(held_out)},
        label_names=names or tuple(str(i) for i in range(found.classes)),
    )


def _read(source: str, prepare: Any, **options: Any) -> Images:
    if prepare is not None and source in (DIGITS, "fashion-mnist"):
        raise ValueError(f"data={source} are arrays, which no image processor reads. Give pictures, or use pretrain.")
    if source == DIGITS:
        return read_digits(**options)
    folder = Path(resolve_data(source))
    if not folder.exists():
        return _of_datasets(source, load_dataset, prepare, **options)
    if not folder.is_dir():
        raise ValueError(f"data={quoted(source)} is a file. Give a folder of pictures, or one with MNIST's four files.")
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _of_datasets(source, load_from_disk, prepare, **options)
    if prepare is None and any(folder.glob("*-ubyte.gz")):
        return read_images(folder, **options)
    if has_pictures(folder):
        return read_pictures(folder, prepare=prepare, **options)
    raise ValueError(
        f"data={quoted(source)} holds no images: no picture ({', '.join(SUFFIXES)}) in it or in a subfolder, none of "
        "MNIST's four files, and no data set that `datasets` has saved. Give a folder with images."
    )


def _of_datasets(source: str, read: Any, prepare: Any, **options: Any) -> Images:
    """The training part of a data set of images, its column of images and its labels, if it has any."""
    try:
        found = read(source)
    except Exception as error:  # the hub client and the readers raise a dozen kinds
        line = str(error).strip().splitlines()
        raise ValueError(
            f"data={quoted(source)} is no folder here, and `datasets` cannot read it: "
            f"{quoted(line[0] if line else type(error).__name__)}. Check the name."
        ) from None
    rows: Dataset = found.get("train", next(iter(found.values()))) if isinstance(found, DatasetDict) else found
    features: Features = rows.features
    column = next((name for name, kind in features.items() if isinstance(kind, Image)), None)
    if column is None:
        raise ValueError(f"data={quoted(source)} has no column of images. Its columns: {', '.join(features)}.")
    if len(rows) < 2:
        raise ValueError(f"data={quoted(source)} has {len(rows)} images, and one must be held out. Give two or more.")
    pictures = [(prepare or as_pixels)(picture) for picture in rows[column]]
    if len({picture.shape for picture in pictures}) > 1:
        sizes = sorted({f"{picture.shape[0]}x{picture.shape[1]}" for picture in pictures})
        raise ValueError(
            f"data={quoted(source)} has images of different sizes or channels ({', '.join(sizes[:4])}). Bring them to "
            "one."
        )
    label = next((name for name, kind in features.items() if isinstance(kind, ClassLabel)), None)
    names = tuple(features[label].names) if label is not None else ("image",)
    labels = np.array(rows[label], dtype=np.int64) if label is not None else np.zeros(len(rows), dtype=np.int64)
    return split(np.stack(pictures), labels, names, **options)


def arrays_of(rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 [n, h, w, c], and labels [n], of a loader's rows; read off the table, as lists take a minute."""
    table: Any = rows.with_format("arrow")[:]
    flat, shape = table["pixel_values"].combine_chunks(), np.asarray(rows[0]["pixel_values"]).shape
    while hasattr(flat, "flatten") and hasattr(flat.type, "value_type"):
        flat = flat.flatten()
    pixels = flat.to_numpy(zero_copy_only=False).astype(np.uint8).reshape(len(rows), *shape)
    return pixels if pixels.ndim == 4 else pixels[..., None], table["labels"].to_numpy()
