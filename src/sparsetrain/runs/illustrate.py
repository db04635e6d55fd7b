"""Pictures that only some methods have, put into the report of a finished run: patterns and flip rates."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from sparsetrain.core.config import MethodConfig
from sparsetrain.core.errors import CheckpointError
from sparsetrain.measure.patterns import add_pictures
from sparsetrain.measure.plots import flip_rates
from sparsetrain.methods import FloodFillAttention, SemiStructured
from sparsetrain.runs.patterns import REPORT, draw_patterns, saved_folder
from sparsetrain.runs.sidecar import read_state

Curve = list[tuple[int, float]]


def illustrate(run: str | Path, configs: tuple[MethodConfig, ...]) -> None:
    """Add the pictures of a run's methods to its report.html: block patterns, and 2:4 flip rates by step."""
    kinds: set[Any] = {type(config) for config in configs}
    if FloodFillAttention in kinds:
        with contextlib.suppress(CheckpointError):  # a run without a probe has no map to draw
            draw_patterns(run)
    curves = read_flips(run) if SemiStructured in kinds else {}
    if any(len(curve) > 1 for curve in curves.values()):
        page = (Path(run) / REPORT).read_text(encoding="utf-8")
        title = "Share of the 2:4 mask that changed since the refresh before, by layer and in the mean"
        pictures = [(title, flip_rates(curves))]
        page = add_pictures(page, pictures, name="flips", heading="Flip rate of the 2:4 masks")
        (Path(run) / REPORT).write_text(page, encoding="utf-8")


def read_flips(run: str | Path) -> dict[str, Curve]:
    """Site -> (optimizer step, flip rate) of every mask refresh of a saved run, averaged over an FFN's linears.

    Raises:
        CheckpointError: nothing is saved there.
    """
    found: dict[str, Curve] = {}
    for key, tensors in read_state(saved_folder(Path(run))).items():
        site, _, method = key.rpartition(":")
        if method == SemiStructured.method and "history" in tensors:
            found[site] = [(int(row[0]), sum(row[1:]) / len(row[1:])) for row in tensors["history"].tolist()]
    return found
