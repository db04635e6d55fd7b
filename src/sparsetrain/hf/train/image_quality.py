"""What a diffusion model makes, beside its loss: a grid of samples, and how far they are from the data (FID, KID)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sparsetrain.core.files import write_whole
from sparsetrain.hf.data import DataBundle
from sparsetrain.hf.data.images import arrays_of
from sparsetrain.hf.model.diffusion_config import num_labels
from sparsetrain.hf.model.sampling import diffusion_model, sample
from sparsetrain.hf.train.parts import Parts
from sparsetrain.measure.image_distance import frechet_distance, kernel_distance
from sparsetrain.measure.image_features import features_of
from sparsetrain.measure.pictures import image_grid
from sparsetrain.measure.schema import ImageQuality
from sparsetrain.runs.events import Report

GRID, NUM, STEPS, SECONDS = 64, 512, 25, 90.0
"""Of a run's end: images that are shown, that are measured, forwards for each, and what the measuring may take."""
MOST_REAL = 10_000


def image_quality(images: np.ndarray, bundle: DataBundle, *, kind: str = "trained", steps: int = 0) -> ImageQuality:
    """FID and KID of images (uint8 [n, h, w, c]) from the training images of a bundle, up to `MOST_REAL` of them.

    Args:
        kind: whose features, of `image_features.KINDS`. steps: forwards that each image took, to be recorded.

    Raises:
        ValueError: as `features_of`.
    """
    assert bundle.eval is not None
    train = arrays_of(bundle.train)
    read = features_of(kind, train, arrays_of(bundle.eval))
    real = read.features(train[0][:MOST_REAL])
    made = read.features(images)
    return {
        "fid": frechet_distance(made, real),
        "kid": kernel_distance(made, real),
        "num": len(images),
        "real": len(real),
        "steps": steps,
        "features": read.says,
    }


def drawn_labels(model: Any, bundle: DataBundle, num: int) -> list[int] | None:
    """Labels for `num` images, each class as often as in the data; None for a model that takes none."""
    if not num_labels(diffusion_model(model).config):
        return None
    known = np.sort(np.asarray(bundle.train["labels"]))
    return known[(np.arange(num) * len(known)) // num].tolist()


def shows(model: Any, parts: Parts, folder: Path, report: Report) -> dict[str, Any]:
    """Draw a grid into `samples.png`, and measure; the entries of the run's record.

    Whatever would take more than `SECONDS` is left to `sparsetrain sample --quality`, with a note.
    """
    seed = parts.recipe.seed

    def draw(num: int, name: str) -> np.ndarray:
        tell: Callable[[float], None] = lambda share: report({"event": "phase", "name": name, "share": share})  # noqa: E731
        labels = drawn_labels(model, parts.bundle, num)
        return sample(model, num, labels=labels, steps=STEPS, seed=seed, progress=tell)

    began = time.monotonic()
    grid = draw(GRID, "drawing samples")
    write_whole(folder / "samples.png", image_grid(grid))
    found: dict[str, Any] = {"pictures": {"samples.png": f"{GRID} samples, {STEPS} steps of DDIM each"}}
    if (time.monotonic() - began) * NUM / GRID > SECONDS:
        text = (
            f"FID and KID of {NUM} samples would take more than {SECONDS:.0f} s: sparsetrain sample {folder} --quality"
        )
        report({"event": "note", "text": text})
        return found
    try:
        quality = image_quality(draw(NUM, "drawing samples to measure"), parts.bundle, steps=STEPS)
    except ValueError as error:
        report({"event": "note", "text": f"No FID and KID: {error}"})
        return found
    text = f"FID {quality['fid']:.2f}, KID {quality['kid']:.4f} of {NUM} samples, by {quality['features']}."
    report({"event": "note", "text": text})
    return found | {"images": quality}
