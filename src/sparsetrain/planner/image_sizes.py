"""The size of the images that a config takes."""

from __future__ import annotations

from typing import Any

KEYS = {"image_size", "sample_size"}
"""Of a config, that say how large images are."""


def of_images(config: Any) -> Any:
    """The config that tells of images: of a pair of encoders, that of the one that reads them."""
    return getattr(config, "vision_config", config)


def image_size(config: Any) -> tuple[int, int]:
    """(height, width) of the images that a config takes."""
    size = of_images(config).image_size
    return (size[0], size[1]) if isinstance(size, list | tuple) else (size, size)


def image_shape(config: Any) -> tuple[int, int, int]:
    """(channels, height, width) of these images."""
    return (of_images(config).num_channels, *image_size(config))


def image_tokens(config: Any) -> int:
    """Patches that such an image is cut into."""
    height, width = image_size(config)
    size = of_images(config).patch_size
    patch = size if isinstance(size, list | tuple) else [size] * 2
    return (height // patch[0]) * (width // patch[1])
