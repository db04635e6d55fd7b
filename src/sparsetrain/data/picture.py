"""One picture: read from a file as a model of images takes it, and written as one."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sparsetrain.data.files import check_regular, shown


def read_picture(
    path: Path, size: tuple[int, int], channels: int, prepare: Callable[[Any], np.ndarray] | None = None
) -> np.ndarray:
    """A picture file as uint8 [height, width, channels], scaled to fit, or as `prepare` makes it of PIL's picture.

    Args:
        size: (height, width). channels: 1 for grey, 3 for colour.

    Raises:
        ValueError: there is no such file, or no picture can be read from it.
    """
    from PIL import Image, UnidentifiedImageError

    if not path.exists():
        raise ValueError(f"{shown(path)} does not exist, and this model takes images. Give the path of a PNG or JPEG.")
    check_regular(path)
    try:
        with Image.open(path) as picture:
            if prepare is not None:
                return prepare(picture)
            scaled = picture.convert("L" if channels == 1 else "RGB").resize((size[1], size[0]))
            return np.asarray(scaled, dtype=np.uint8).reshape(*size, channels)
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{shown(path)} is no picture that can be read ({error}). Give a PNG or JPEG.") from None


def as_png(picture: np.ndarray) -> bytes:
    """A picture as the bytes of a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(buffer, format="PNG")
    return buffer.getvalue()
