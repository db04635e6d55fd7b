"""Images from picture files (`data.picture_files` says which, and of what class), and scikit-learn's digits."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from sparsetrain.core.quote import quoted
from sparsetrain.data.files import check_regular, shown
from sparsetrain.data.images import Images
from sparsetrain.data.picture_files import SUFFIXES, Labelled, find_pictures
from sparsetrain.data.processors import upright
from sparsetrain.data.remarks import Remarks
from sparsetrain.data.split import split_rows

DIGITS = "digits"
_MOST_PIXELS = 2**31
"""Numbers of all images together."""

Prepare = Callable[[Any], np.ndarray]
"""A picture of PIL -> uint8 [h, w] or [h, w, c], as a model takes it."""


def read_pictures(
    folder: Path,
    *,
    max_rows: int | None,
    max_eval_rows: int | None,
    seed: int,
    eval_ratio: float = 0.1,
    prepare: Prepare | None = None,
    split: str = "train",
    eval_split: str | None = None,
    captions: bool = False,
) -> Images:
    """The pictures of a folder, with the classes of `find_pictures`; a share is held out, or a split of its own.

    Grey pictures have one channel; where one has colours, all have three.

    Args:
        max_rows, max_eval_rows: use this many of each part, chosen by `seed`. eval_ratio: share that is held out.
        prepare: makes of each what a model takes; without it all must be of one size.
        split, eval_split, captions: as `find_pictures` takes them (eval_split: its held_out).

    Raises:
        ValueError: no picture in it, fewer than two, one that cannot be read, pictures of more than one size, or as
            `find_pictures`.
    """
    remarks = Remarks()
    found = find_pictures(folder, split=split, held_out=eval_split, captions=captions, remarks=remarks)
    if not found.train or found.held_out == []:
        side = "picture to train on" if not found.train else "picture in the split that is held out"
        raise ValueError(f"{shown(folder)} holds no {side} ({', '.join(SUFFIXES)}). Put some there.")
    made = images_of(
        _side(found.train, prepare),
        None if found.held_out is None else _side(found.held_out, prepare),
        found.names,
        name=shown(folder),
        max_rows=max_rows,
        max_eval_rows=max_eval_rows,
        seed=seed,
        eval_ratio=eval_ratio,
    )
    return replace(made, said=remarks.text())


@dataclass(frozen=True)
class Side:
    """Pictures to train on, or held out.

    classes: of each, by name; "" for none. read: gives that of a number, uint8 [h, w] or [h, w, c]. place: says where
    it is from.
    """

    classes: Sequence[str]
    read: Callable[[int], np.ndarray]
    place: Callable[[int], str]


def _side(files: list[Labelled], prepare: Prepare | None) -> Side:
    paths = [path for _, path in files]
    return Side([name for name, _ in files], lambda i: _read(paths[i], prepare), lambda i: shown(paths[i]))


def images_of(
    train: Side,
    held_out: Side | None,
    names: tuple[str, ...],
    *,
    name: str,
    max_rows: int | None,
    max_eval_rows: int | None,
    seed: int,
    eval_ratio: float = 0.1,
) -> Images:
    """Images of classes that `names` numbers, those to train on and those held out; None: a share of the first.

    Raises:
        ValueError: too few, of several sizes, or one held out is of no class that is trained on.
    """
    titles = names if names != ("",) else ("image",)
    if held_out is None:
        if len(train.classes) < 2:
            raise ValueError(f"{name} holds one picture, and one must be held out. Give more.")
        pixels, labels = _pixels(train, range(len(train.classes))), _numbers(train, names, range(len(train.classes)))
        limits = {"max_rows": max_rows, "max_eval_rows": max_eval_rows, "seed": seed, "eval_ratio": eval_ratio}
        return divided(pixels, labels, titles, **limits)
    generator, sides = np.random.default_rng(seed), []
    for side, limit in ((train, max_rows), (held_out, max_eval_rows)):
        kept = generator.permutation(len(side.classes))[:limit].tolist()
        _numbers(side, names, range(len(side.classes)))  # of those left out, too
        sides.append({"pixel_values": _pixels(side, kept), "labels": _numbers(side, names, kept)})
    one, other = (side["pixel_values"].shape[1:] for side in sides)
    if one != other:
        raise ValueError(f"{name} has pictures of {one} to train on, and of {other} held out. Bring them to one.")
    return Images(train=sides[0], held_out=sides[1], size=one[:2], classes=len(titles), names=titles)


def _numbers(side: Side, names: tuple[str, ...], kept: Sequence[int]) -> np.ndarray:
    numbers = {name: i for i, name in enumerate(names)}
    for i in kept:
        if side.classes[i] not in numbers:
            raise ValueError(
                f"{side.place(i)} is of class {quoted(side.classes[i])!r}, and those trained on are "
                f"{quoted(', '.join(names))}. Move it."
            )
    return np.array([numbers[side.classes[i]] for i in kept], dtype=np.int64)


def _pixels(side: Side, kept: Sequence[int]) -> np.ndarray:
    """uint8 [n, h, w], or [n, h, w, 3] where one has colours."""
    pictures = [side.read(i) for i in kept]
    height, width = pictures[0].shape[:2]
    for i, picture in zip(kept, pictures, strict=True):
        if picture.shape[:2] != (height, width):
            raise ValueError(
                f"{side.place(i)} is {picture.shape[0]}x{picture.shape[1]} (height x width), and "
                f"{side.place(kept[0])} is {height}x{width}. Bring all pictures to one size, or "
                "name the model's, to which they are scaled and cut (pretrain: --set image_size=64)."
            )
    if len(pictures) * height * width > _MOST_PIXELS:
        raise ValueError(
            f"{len(pictures):,} pictures of {height}x{width} are more than memory may hold. Use fewer or smaller ones."
        )
    if any(picture.ndim == 3 for picture in pictures):
        pictures = [p if p.ndim == 3 else np.repeat(p[:, :, None], 3, axis=2) for p in pictures]
    return np.stack(pictures)


def read_digits(*, max_rows: int | None, max_eval_rows: int | None, seed: int) -> Images:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels in 17 greys; its file is read, and no code of it runs.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    found = importlib.util.find_spec("sklearn")
    place = next(iter(found.submodule_search_locations or ()), None) if found is not None else None
    path = Path(place or "") / "datasets" / "data" / "digits.csv.gz"
    if place is None or not path.is_file():
        raise ValueError(
            "data=digits are scikit-learn's, which is not installed. Run: pip install scikit-learn; or use "
            "fashion-mnist, or a folder of pictures."
        )
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    pixels = np.rint(table[:, :64].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    names = tuple(str(i) for i in range(10))
    return divided(
        pixels, table[:, 64].astype(np.int64), names, max_rows=max_rows, max_eval_rows=max_eval_rows, seed=seed
    )


def divided(
    pixels: np.ndarray,
    labels: np.ndarray,
    names: tuple[str, ...],
    *,
    max_rows: int | None,
    max_eval_rows: int | None,
    seed: int,
    eval_ratio: float = 0.1,
) -> Images:
    """Images in two parts, of each class alike; equal images are on one side.

    Raises:
        ValueError: all are equal.
    """
    keys = [sha256(image.tobytes()).hexdigest() for image in pixels]
    train, out = split_rows(keys, eval_ratio, seed, labels.tolist())
    if not train or not out:
        raise ValueError(f"{len(keys)} images, {len(set(keys))} of them distinct, leave none to hold out. Give more.")
    sides = [{"pixel_values": pixels[kept], "labels": labels[kept]} for kept in (train[:max_rows], out[:max_eval_rows])]
    return Images(
        train=sides[0],
        held_out=sides[1],
        size=(pixels.shape[1], pixels.shape[2]),
        classes=len(names),
        names=names,
    )


def _read(path: Path, prepare: Prepare | None) -> np.ndarray:
    """uint8, [h, w] of a grey picture and [h, w, 3] of another, or as `prepare` makes it."""
    from PIL import Image  # comes with matplotlib

    check_regular(path)
    try:
        with Image.open(path) as picture:
            return (prepare or as_pixels)(upright(picture))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{shown(path)} cannot be read as a picture: {quoted(str(error))}. Get it again, or take it out."
        ) from None


def as_pixels(picture: object) -> np.ndarray:
    """A picture of PIL as uint8, [h, w] where it is grey and [h, w, 3] where it is not."""
    kind = "L" if picture.mode in ("1", "L", "LA") else "RGB"  # type: ignore[attr-defined]
    return np.asarray(picture.convert(kind), dtype=np.uint8)  # type: ignore[attr-defined]
