"""Images from a folder of picture files, a class a subfolder, and scikit-learn's digits."""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from sparsetrain.core.quote import quoted
from sparsetrain.data.files import check_regular, shown
from sparsetrain.data.images import Images
from sparsetrain.data.split import split_rows

DIGITS = "digits"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_HELD_OUT = ("test", "validation", "valid", "val")
_MOST_PIXELS = 2**31
"""Numbers of all images together."""


def has_pictures(folder: Path) -> bool:
    """Does a folder, or a subfolder of it, hold a picture file?"""
    return next(_files(folder), None) is not None or _parts(folder) is not None


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
) -> Images:
    """The pictures of a folder: those of each subfolder are a class, in the order of their names; or all are one. With
    subfolders `train` and `test` (or `validation`) of such folders, the second is what is held out.

    Grey pictures have one channel; where one has colours, all have three.

    Args:
        max_rows, max_eval_rows: use this many of each part, chosen by `seed`. eval_ratio: share that is held out.
        prepare: makes of each what a model takes; without it all must be of one size.

    Raises:
        ValueError: no picture in it, fewer than two, one that cannot be read, or pictures of more than one size.
    """
    if (parts := _parts(folder)) is not None:
        return _read_parts(*parts, max_rows=max_rows, max_eval_rows=max_eval_rows, seed=seed, prepare=prepare)
    files = list(_files(folder))
    if not files:
        raise ValueError(f"{shown(folder)} holds no picture ({', '.join(SUFFIXES)}), nor a subfolder with one.")
    if len(files) < 2:
        raise ValueError(f"{shown(folder)} holds one picture, and one must be held out. Give more.")
    names = sorted({name for name, _ in files})
    if "" in names and len(names) > 1:
        lone = next(path for name, path in files if not name)
        raise ValueError(
            f"{shown(folder)} holds {quoted(lone.name)} beside subfolders with pictures, which are classes. Put it "
            "into one of them."
        )
    labels = np.array([names.index(name) for name, _ in files], dtype=np.int64)
    pixels = _pixels([path for _, path in files], prepare)
    return split(pixels, labels, tuple(names) if names != [""] else ("image",), max_rows=max_rows,
                 max_eval_rows=max_eval_rows, seed=seed, eval_ratio=eval_ratio)  # fmt: skip


def _parts(folder: Path) -> tuple[Path, Path] | None:
    """The folders of what is trained on and of what is held out, where there are two and each has classes."""
    train, held_out = folder / "train", next((folder / n for n in _HELD_OUT if (folder / n).is_dir()), None)
    if held_out is None or not train.is_dir():
        return None
    have_classes = all(any(name for name, _ in _files(part)) for part in (train, held_out))
    return (train, held_out) if have_classes else None


def _read_parts(
    train: Path, held_out: Path, *, max_rows: int | None, max_eval_rows: int | None, seed: int, prepare: Prepare | None
) -> Images:
    """Pictures that somebody has divided; the classes are those of the first part."""
    names = sorted({name for name, _ in _files(train) if name})
    generator, sides = np.random.default_rng(seed), []
    for part, limit in ((train, max_rows), (held_out, max_eval_rows)):
        files = [(name, path) for name, path in _files(part)]
        for name, path in files:
            if name not in names:
                raise ValueError(
                    f"{shown(path)} is of no class of {shown(train)}: {quoted(', '.join(names))}. Move it."
                )
        kept = [files[i] for i in generator.permutation(len(files))[:limit]]
        labels = np.array([names.index(name) for name, _ in kept], dtype=np.int64)
        sides.append({"pixel_values": _pixels([path for _, path in kept], prepare), "labels": labels})
    one, other = (side["pixel_values"].shape[1:] for side in sides)
    if one != other:
        raise ValueError(f"{shown(train)} has pictures of {one}, and {shown(held_out)} of {other}. Bring them to one.")
    return Images(train=sides[0], held_out=sides[1], size=one[:2], classes=len(names), names=tuple(names))


def _pixels(paths: list[Path], prepare: Prepare | None) -> np.ndarray:
    """uint8 [n, h, w], or [n, h, w, 3] where one has colours."""
    pictures = [_read(path, prepare) for path in paths]
    _check_sizes(paths, pictures)
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
    return split(
        pixels, table[:, 64].astype(np.int64), names, max_rows=max_rows, max_eval_rows=max_eval_rows, seed=seed
    )


def split(
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


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name of the subfolder, "" for none; file), in the order of their names."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            yield from ((path.name, inner) for inner in sorted(path.iterdir()) if _is_picture(inner))
        elif _is_picture(path):
            yield "", path


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _read(path: Path, prepare: Prepare | None) -> np.ndarray:
    """uint8, [h, w] of a grey picture and [h, w, 3] of another, or as `prepare` makes it."""
    from PIL import Image  # comes with matplotlib

    check_regular(path)
    try:
        with Image.open(path) as picture:
            return (prepare or as_pixels)(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{shown(path)} cannot be read as a picture: {quoted(str(error))}. Get it again, or take it out."
        ) from None


def as_pixels(picture: object) -> np.ndarray:
    """A picture of PIL as uint8, [h, w] where it is grey and [h, w, 3] where it is not."""
    kind = "L" if picture.mode in ("1", "L", "LA") else "RGB"  # type: ignore[attr-defined]
    return np.asarray(picture.convert(kind), dtype=np.uint8)  # type: ignore[attr-defined]


def _check_sizes(paths: list[Path], pictures: list[np.ndarray]) -> None:
    height, width = pictures[0].shape[:2]
    for path, picture in zip(paths, pictures, strict=True):
        if picture.shape[:2] != (height, width):
            raise ValueError(
                f"{shown(path)} is {picture.shape[0]}x{picture.shape[1]} (height x width), and {shown(paths[0])} is "
                f"{height}x{width}. Bring all pictures to one size."
            )
    if len(pictures) * height * width > _MOST_PIXELS:
        raise ValueError(
            f"{len(pictures):,} pictures of {height}x{width} are more than memory may hold. Use fewer or smaller ones."
        )
