"""Features of images, by which two sets of them are compared: of a small classifier that is trained here on the data,
or of Inception, where torchmetrics and its weights are at hand.

A number from the small classifier compares models of the same data here, and with no published number.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from sparsetrain.core.remembered import cache_folder, recall, remember

WIDTH = 64
_STEPS, _BATCH, _MOST = 800, 64, 20_000
_VERSION = 1
"""Raise when the classifier or its training changes: what is cached is then trained anew."""
KINDS = ("trained", "inception")


@dataclass(frozen=True, kw_only=True)
class Features:
    """features: uint8 images [n, h, w, c] -> [n, d]. says: what they are, wherever a number of theirs stands."""

    features: Callable[[np.ndarray], np.ndarray]
    says: str


class SmallClassifier(nn.Module):
    """Two convolutions, a layer of `WIDTH` features, a head; of images of any size."""

    mean: Tensor
    spread: Tensor

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 9, WIDTH)
        self.head = nn.Linear(WIDTH, classes)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("spread", torch.ones(WIDTH))

    def standard(self, x: Tensor) -> Tensor:
        """Features, each with mean 0 and variance 1 over the data: none of them, nor their size, counts for more."""
        return (self.features(x) - self.mean) / self.spread

    def features(self, x: Tensor) -> Tensor:
        """[n, c, h, w] in [-1, 1] -> [n, WIDTH]."""
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.adaptive_avg_pool2d(F.relu(self.second(x)), 3)
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def features_of(kind: str, train: tuple[np.ndarray, np.ndarray], held_out: tuple[np.ndarray, np.ndarray]) -> Features:
    """What reads features of images.

    Args:
        kind: of `KINDS`. train, held_out: images (uint8 [n, h, w, c]) and their labels [n].

    Raises:
        ValueError: images of one class that are not square; no torchmetrics, or no weights for it.
    """
    return inception() if kind == "inception" else trained(train, held_out)


def trained(train: tuple[np.ndarray, np.ndarray], held_out: tuple[np.ndarray, np.ndarray]) -> Features:
    """Of a classifier that is trained on the data, in some 15 seconds; the same for the same images in any order.

    Images of one label are turned, and it learns to tell by how much (arXiv 1803.07728).
    """
    what, upright = "", train[0]
    if len(np.unique(train[1])) < 2:
        what = ", which have one label, by how many quarters they were turned"
        train, held_out = turned(train[0][: _MOST // 4]), turned(held_out[0])
    pixels, labels = train
    classes = int(labels.max()) + 1
    keys = [sha256(image.tobytes() + bytes([label % 256])).hexdigest() for image, label in zip(pixels, labels)]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    name = sha256("\n".join([keys[i] for i in order] + [str(_VERSION)]).encode()).hexdigest()[:24]
    path = cache_folder() / "image-features" / f"{name}.json"
    model = SmallClassifier(pixels.shape[3], classes)
    if not _recalled(model, recall(path)):
        chosen = order[:_MOST]
        _train(model, pixels[chosen], labels[chosen])
        _standardise(model, upright[:_MOST] if what else pixels[chosen])
        remember(path, base64.b64encode(save(model.state_dict())).decode("ascii"))
    right = np.concatenate(_read(model, held_out[0])).argmax(1) == held_out[1]
    return Features(
        features=lambda images: np.concatenate(_read(model.standard, images)),
        says=f"{WIDTH} features of a classifier that was trained here on the same images{what} ({right.mean():.1%} of "
        "the held-out ones right); comparable between models of these data here, and with no published number",
    )


def turned(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images [4 n, h, w, c], each turned by 0 to 3 quarters, and by how many.

    Raises:
        ValueError: they are not square.
    """
    if pixels.shape[1] != pixels.shape[2]:
        raise ValueError(
            f"all images have one label and are {pixels.shape[1]}x{pixels.shape[2]}: features would come from telling "
            "how they are turned, which wants square ones. Give data with two classes or more, or square images."
        )
    quarters = [np.rot90(pixels, quarter, axes=(1, 2)) for quarter in range(4)]
    return np.concatenate(quarters), np.repeat(np.arange(4), len(pixels))


def inception() -> Features:
    """Of Inception v3, as torchmetrics has it: those that published FIDs stand on.

    Raises:
        ValueError: torchmetrics is not installed, or its weights cannot be had.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance  # type: ignore[import-not-found]
    except ImportError:
        raise ValueError(
            "features=inception are torchmetrics', which is not installed. Run: pip install 'torchmetrics[image]'; or "
            "take features=trained."
        ) from None
    try:
        made: Any = FrechetInceptionDistance(feature=2048)
    except Exception as error:  # it fetches the weights, which fails in as many ways as there are networks
        raise ValueError(
            f"the weights of Inception could not be had ({type(error).__name__}: {str(error).partition(chr(10))[0]}). "
            "Put them into the cache of torch.hub, or take features=trained."
        ) from None

    def read(pixels_nchw: Tensor) -> Tensor:
        return made.inception(pixels_nchw.expand(-1, 3, -1, -1)).float()

    def features(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            parts = [read(_channels_first(images[i : i + 64])).cpu().numpy() for i in range(0, len(images), 64)]
        return np.concatenate(parts)

    return Features(features=features, says="2048 features of Inception v3 (torchmetrics)")


def _recalled(model: SmallClassifier, stored: str | None) -> bool:
    try:
        model.load_state_dict(load(base64.b64decode(stored or "", validate=True)))
    except (SafetensorError, binascii.Error, RuntimeError):
        return False
    return True


def _train(model: SmallClassifier, pixels: np.ndarray, labels: np.ndarray) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in model.children():
            module.reset_parameters()  # type: ignore[operator]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / _STEPS)
        chosen = torch.randint(len(pixels), (_BATCH,), generator=generator).numpy()
        x = _channels_first(pixels[chosen]).float().div(127.5).sub(1)
        loss = F.cross_entropy(model(x), torch.from_numpy(labels[chosen]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _standardise(model: SmallClassifier, pixels: np.ndarray) -> None:
    """Take mean and spread of the features of these images as theirs over the data."""
    found = torch.from_numpy(np.concatenate(_read(model.features, pixels)))
    model.mean.copy_(found.mean(0))
    model.spread.copy_(found.std(0).clamp(min=1e-3))


def _read(function: Callable[[Tensor], Tensor], images: np.ndarray) -> list[np.ndarray]:
    with torch.no_grad():
        return [
            function(_channels_first(images[i : i + 256]).float().div(127.5).sub(1)).numpy()
            for i in range(0, len(images), 256)
        ]


def _channels_first(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
