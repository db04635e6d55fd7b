"""Captions of labelled images, made from their labels and from what things of that label have.

They train small models of images and texts where no captions are at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

CLOTHES: dict[str, tuple[str, ...]] = {
    "t-shirt": ("short sleeves", "covers the upper body", "thin and light", "made of cotton", "wide"),
    "trouser": ("two legs", "covers the legs", "narrow", "long", "a zip"),
    "pullover": ("long sleeves", "knitted", "covers the upper body", "thick and warm", "no buttons"),
    "dress": ("one piece from shoulder to knee", "no sleeves", "long", "thin and light", "narrow"),
    "coat": ("long sleeves", "buttons down the front", "worn over other clothes", "thick and warm", "a collar"),
    "sandal": ("worn on the feet", "an open toe", "straps", "a flat sole", "made of leather"),
    "shirt": ("long sleeves", "a collar", "buttons down the front", "covers the upper body", "made of cotton"),
    "sneaker": ("worn on the feet", "laces", "a flat sole", "short", "a closed toe"),
    "bag": ("a handle to carry it by", "used to carry things", "wide", "made of leather", "a zip"),
    "boot": ("worn on the feet", "a high shaft around the ankle", "a high heel", "made of leather", "thick and warm"),
}
"""Fashion-MNIST's labels (`data.images.FASHION_LABELS`), and what most of their things have."""


def caption(label: str, attributes: Mapping[str, Sequence[str]], draw: Random) -> str:
    """A caption of an image with a label: it, one of its attributes, or both.

    Raises:
        ValueError: a label without attributes.
    """
    if not attributes.get(label):
        raise ValueError(f"label {label!r} has no attributes to make captions of. Known: {', '.join(attributes)}.")
    known = draw.sample(sorted(attributes[label]), k=draw.randint(1, min(2, len(attributes[label]))))
    return draw.choice((f"a {label}", " and ".join(known), f"a {label}, {' and '.join(known)}"))


def all_attributes(attributes: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Every attribute once, in the order of the labels."""
    return tuple(dict.fromkeys(name for names in attributes.values() for name in names))
