"""Pictures as a model takes them: by the image processor of a trained one, or scaled and cut to its size."""

from __future__ import annotations

from typing import Any

import numpy as np


def prepared(processor: Any, channels: int, picture: Any) -> np.ndarray:
    """A picture of PIL as a model's processor scales and cuts it: uint8 [h, w, channels]."""
    shown = picture.convert("L" if channels == 1 else "RGB")
    made_chw = processor(images=[shown], return_tensors="np", do_rescale=False, do_normalize=False)["pixel_values"][0]
    return np.clip(np.rint(made_chw), 0, 255).astype(np.uint8).transpose(1, 2, 0)


def fitted(image: tuple[int, int, int], picture: Any) -> np.ndarray:
    """A picture of PIL scaled until it covers (channels, height, width), and its middle: uint8 [h, w], [h, w, 3] of
    three channels."""
    from PIL import Image, ImageOps  # comes with matplotlib

    channels, height, width = image
    shown = picture.convert("L" if channels == 1 else "RGB")
    return np.asarray(ImageOps.fit(shown, (width, height), Image.Resampling.BICUBIC), dtype=np.uint8)


def upright(picture: Any) -> Any:
    """A picture turned as its camera was held; as it lies where what was written of that cannot be read."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # a damaged note beside whole pixels, of which PIL raises half a dozen kinds
        return picture


def normalisation(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | tuple[()]:
    """(mean, std) of each channel by which a processor normalises; () without a processor.

    Raises:
        ValueError: it makes of bytes something else than numbers in [0, 1] first.
    """
    if processor is None:
        return ()
    factor = processor.rescale_factor if getattr(processor, "do_rescale", False) else 1.0
    if abs(255 * factor - 1) > 1e-3:
        raise ValueError(
            f"the model's image processor multiplies bytes by {factor:g}, not by 1/255, and that is not built here. "
            "Set rescale_factor in its preprocessor_config.json."
        )
    if not getattr(processor, "do_normalize", False):
        return (0.0,), (1.0,)
    return tuple(processor.image_mean), tuple(processor.image_std)
