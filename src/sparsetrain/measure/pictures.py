"""Drawing a method's pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparsetrain.core.pictures import Panel, Picture
from sparsetrain.core.units import number_text
from sparsetrain.measure.colours import FAINT, INK, light


def draw(picture: Picture) -> bytes:
    """A picture as PNG."""
    return _draw_curves(picture.curves, picture.y) if picture.curves else _draw_panels(picture)


def _draw_curves(sites: Mapping[str, Sequence[tuple[float, float]]], y: str) -> bytes:
    """Something by step: each site faint, their mean strong."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.6, 3.5), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: nothing global is touched
    axes = figure.add_subplot()
    axes.grid(axis="y", color=FAINT)
    for curve in sites.values():
        axes.plot([step for step, _ in curve], [rate for _, rate in curve], color=light("sparse"), alpha=0.3)
    together = list(zip(*sites.values()))
    steps = [rows[0][0] for rows in together]
    mean = [sum(rate for _, rate in rows) / len(rows) for rows in together]
    axes.plot(steps, mean, color=light("sparse"), linewidth=1.8)
    axes.set_title(f"mean {number_text(mean[-1])} at the end", fontsize=9, color=light("sparse"), loc="right")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.set_xlabel("optimizer step", fontsize=9.5, color=INK)
    axes.set_ylabel(y, fontsize=9.5, color=INK)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _draw_panels(picture: Picture) -> bytes:
    """Maps are shown by their square root, or a few cells would hide all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    rows, columns = len(picture.panels), len(picture.panels[0])
    figure = Figure(figsize=(3.2 * columns, 3.4 * rows + 0.3), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: nothing global is touched
    figure.suptitle(picture.title, fontsize=11)

    def show(axis: Any, panel: Panel) -> None:
        if panel.kept:
            axis.imshow(panel.values, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        else:
            norm = PowerNorm(0.5, vmin=0, vmax=max(float(panel.values.max()), 1e-12))
            image = axis.imshow(panel.values, cmap="viridis", norm=norm, interpolation="nearest")
            figure.colorbar(image, ax=axis, shrink=0.75).ax.tick_params(labelsize=7)
        axis.set_title(panel.name, fontsize=9)
        axis.set_xlabel("key block", fontsize=8)
        axis.set_ylabel("query block", fontsize=8)
        axis.tick_params(labelsize=7)

    for axes, panels in zip(figure.subplots(rows, columns, squeeze=False), picture.panels, strict=True):
        for axis, panel in zip(axes, panels, strict=True):
            show(axis, panel)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def image_grid(images: np.ndarray, columns: int | None = None, *, gap: int = 2, least: int = 28) -> bytes:
    """Images in rows, as PNG.

    Args:
        images: uint8 [n, h, w, c], c 1 or 3. columns: of the grid; as square as can be if not given.
        gap: pixels between them. least: smaller images are shown larger, each pixel as a square.
    """
    from PIL import Image  # comes with matplotlib

    num, height, width, channels = images.shape
    across = min(num, columns or math.ceil(math.sqrt(num)))
    rows = math.ceil(num / across)
    sheet = np.full((rows * (height + gap) - gap, across * (width + gap) - gap, channels), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // across * (height + gap), i % across * (width + gap)
        sheet[top : top + height, left : left + width] = image
    zoom = max(1, math.ceil(2 * least / max(height, width)))
    sheet = sheet.repeat(zoom, axis=0).repeat(zoom, axis=1)
    file = io.BytesIO()
    Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet).save(file, format="PNG")
    return file.getvalue()
