"""One picture: read from a file as a model of images takes it, and written as one."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sparsetrain.data.files import check_regular, shown
from sparsetrain.data.processors import fitted, upright


def read_picture(
    path: Path, image: tuple[int, int, int], prepare: Callable[[Any], np.ndarray] | None = None
) -> np.ndarray:
    """A picture file as uint8 [height, width, channels], as it would be trained on: brought to `image`, or as
    `prepare` makes it of PIL's picture.

    Args:
        image: (channels, height, width), of 1 channel for grey and 3 for colour.

    Raises:
        ValueError: there is no such file, or no picture can be read from it.
    """
    from PIL import Image, UnidentifiedImageError

    if not path.exists():
        raise ValueError(f"{shown(path)} does not exist, and this model takes images. Give the path of a PNG or JPEG.")
    check_regular(path)
    try:
        with Image.open(path) as picture:
            made = (prepare or partial(fitted, image))(upright(picture))
            return made if made.ndim == 3 else made[..., None]
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{shown(path)} is no picture that can be read ({error}). Give a PNG or JPEG.") from None


def as_png(picture: np.ndarray) -> bytes:
    """A picture as the bytes of a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(buffer, format="PNG")
    return buffer.getvalue()
