"""Images with labels: MNIST's idx files, a folder of pictures, digits, or a data set of `datasets`."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Image

from sparsetrain.core.quote import quoted
from sparsetrain.data.collate import ImageCollator
from sparsetrain.data.files import kind_of
from sparsetrain.data.images import FASHION_LABELS, Images, read_images
from sparsetrain.data.labelled import in_order
from sparsetrain.data.picture_files import SUFFIXES, has_pictures
from sparsetrain.data.pictures import DIGITS, Prepare, Side, as_pixels, images_of, read_digits, read_pictures
from sparsetrain.data.processors import fitted, normalisation, prepared
from sparsetrain.data.remarks import Remarks
from sparsetrain.hf.assets import embedded_name, resolve_data
from sparsetrain.hf.data.bundle import DataBundle
from sparsetrain.hf.data.sources import open_source, refuse_revision, unreadable_row
from sparsetrain.hf.data.tables import PARQUET, HubChoice, is_saved


def load_images(
    source: str = "fashion-mnist",
    *,
    max_rows: int | None = None,
    max_eval_rows: int | None = None,
    seed: int = 0,
    processor: Any = None,
    image: tuple[int, int, int] | None = None,
    dataset_config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    eval_split: str | None = None,
    captions: bool = False,
) -> DataBundle:
    """Images from "fashion-mnist", "digits", a folder with MNIST's files, a folder of pictures (a class a subfolder, or
    as its metadata.csv says), or a table with a column of them: Parquet, saved by `datasets`, or on the hub.

    Args:
        max_rows, max_eval_rows: use this many of each part, chosen by `seed`.
        processor: the image processor of a trained model, by which pictures are scaled, cut and normalised.
        image: (channels, height, width) that a model takes. Without a processor, pictures are scaled until they cover
            it, and their middle is cut out; arrays stay. None: pictures stay as they are, and are of one size.
        dataset_config, split, revision: which part of a table is read, and which split of a folder that has some.
        eval_split: held out, in place of a share; of a folder with splits its `test` or `validation` if not given.
        captions: texts that are no classes may stand beside pictures; they are not read.

    Raises:
        ValueError: nothing of the kind is there, or as `read_images` and `read_pictures`.
    """
    prepare: Prepare | None = None if image is None else partial(fitted, image)
    if processor is not None:
        prepare = partial(prepared, processor, 3 if image is None else image[0])
    hub = HubChoice(config=dataset_config, split=split, revision=revision)
    limits = {"max_rows": max_rows, "max_eval_rows": max_eval_rows, "seed": seed}
    found = _read(source, prepare, processor is not None, hub, eval_split, captions, limits)
    train, held_out = Dataset.from_dict(found.train), Dataset.from_dict(found.held_out)
    if prepare is not None:  # as lists, a picture of 224 x 224 takes 10 ms
        train, held_out = train.with_format("numpy"), held_out.with_format("numpy")
    name = embedded_name(source)
    names = FASHION_LABELS if name == "fashion-mnist" else found.names
    height, width = found.size
    said = f"{name or source}: {len(train):,} images of {height}x{width}; held out: {len(held_out):,}{found.said}"
    return DataBundle(
        train=train,
        eval=held_out,
        collate_fn=ImageCollator(*normalisation(processor)),
        description=said,
        counts={"train_rows": len(train), "eval_rows": len(held_out)},
        label_names=names or tuple(str(i) for i in range(found.classes)),
    )


def _read(
    source: str,
    prepare: Prepare | None,
    processed: bool,
    hub: HubChoice,
    eval_split: str | None,
    captions: bool,
    limits: dict[str, Any],
) -> Images:
    if processed and source in (DIGITS, "fashion-mnist"):
        raise ValueError(f"data={source} are arrays, which no image processor reads. Give pictures, or use pretrain.")
    folder, splits = Path(resolve_data(source)), (hub, eval_split) != (HubChoice(), None)
    arrays = source == DIGITS or (not processed and any(folder.glob("*-ubyte.gz")))
    if arrays and splits:
        raise ValueError(f"data={quoted(source)} are arrays with a split of their own. Leave out what names another.")
    if source == DIGITS:
        return read_digits(**limits)
    if arrays:
        return read_images(folder, **limits)
    if folder.is_file() and kind_of(folder) != PARQUET:
        raise ValueError(f"data={quoted(source)} is a file. Give a folder of pictures, or one with MNIST's four files.")
    if folder.is_dir() and not is_saved(folder) and has_pictures(folder):
        refuse_revision(source, hub)
        if hub.config is not None:
            raise ValueError(f"dataset_config={hub.config}: {quoted(source)} are pictures in a folder. Leave it out.")
        return read_pictures(
            folder, prepare=prepare, split=hub.split, eval_split=eval_split, captions=captions, **limits
        )
    return _of_tables(source, prepare, hub, eval_split, limits)


def _of_tables(source: str, prepare: Any, hub: HubChoice, eval_split: str | None, limits: dict[str, Any]) -> Images:
    """The column of images of a table, with its classes if it has any; a share is held out, or a split."""
    if os.path.isdir(source) and not is_saved(Path(source)) and not list(Path(source).rglob("*" + PARQUET)):
        raise ValueError(
            f"data={quoted(source)} holds no images: no picture ({', '.join(SUFFIXES)}) in it or in a subfolder, none "
            "of MNIST's four files, and no table that `datasets` has saved. Give a folder with images."
        )
    train, names = _side(source, prepare, hub)
    held_out = None if eval_split is None else _side(source, prepare, replace(hub, split=eval_split))[0]
    return images_of(train, held_out, names, name=f"data={quoted(source)}", **limits)


def _side(source: str, prepare: Any, hub: HubChoice) -> tuple[Side, tuple[str, ...]]:
    """A table's pictures and their classes: of a column of classes, or one called label."""
    table: Any = open_source(source, hub, Remarks())
    if isinstance(table, list):
        raise ValueError(f"data={quoted(source)} holds no table of images. Give one, or a folder of pictures.")
    features = table.features
    column = next((name for name, kind in features.items() if isinstance(kind, Image)), None)
    if column is None:
        raise ValueError(f"data={quoted(source)} has no column of images. Its columns: {', '.join(features)}.")
    label = next((name for name, kind in features.items() if isinstance(kind, ClassLabel)), None)
    label = label or ("label" if "label" in features else None)
    classes = [""] * len(table) if label is None else table[label][:]
    for i, value in enumerate(classes):
        if not isinstance(value, str | int) or value == -1:
            raise ValueError(f"data={quoted(source)}[{i}]: {label!r} is {value!r}, no class. Leave that row out.")
    known = features[label].names if label is not None and isinstance(features[label], ClassLabel) else None
    classes = list(map(str, classes)) if known is None else [known[value] for value in classes]

    def read(i: int) -> np.ndarray:
        try:
            return (prepare or as_pixels)(table[i][column])
        except Exception as error:  # of decoders, a dozen kinds
            raise unreadable_row(f"data={quoted(source)}[{i}]", error) from error

    return Side(classes, read, lambda i: f"data={quoted(source)}[{i}]"), tuple(known or in_order(classes))


def arrays_of(rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 [n, h, w, c], and labels [n], of a loader's rows; read off the table, as lists take a minute."""
    table: Any = rows.with_format("arrow")[:]
    flat, shape = table["pixel_values"].combine_chunks(), np.asarray(rows[0]["pixel_values"]).shape
    while hasattr(flat, "flatten") and hasattr(flat.type, "value_type"):
        flat = flat.flatten()
    pixels = flat.to_numpy(zero_copy_only=False).astype(np.uint8).reshape(len(rows), *shape)
    return pixels if pixels.ndim == 4 else pixels[..., None], table["labels"].to_numpy()
