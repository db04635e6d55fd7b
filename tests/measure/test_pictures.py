"""Pictures say what their colours and numbers mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsetrain.core.pictures import Panel, Picture
from sparsetrain.core.units import bytes_text
from sparsetrain.measure.pictures import draw
from sparsetrain.measure.profile_report import Stack, _draw_stack


def test_maps_have_a_bar_of_their_colours_and_masks_none(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    real = Figure.colorbar

    def colorbar(self: Figure, image: Any, *given: Any, **options: Any) -> Any:
        drawn.append(image.get_clim())
        return real(self, image, *given, **options)

    monkeypatch.setattr(Figure, "colorbar", colorbar)
    values = np.arange(16.0).reshape(4, 4)
    panels = [Panel(name="map", values=values), Panel(name="kept", values=values > 8, kept=True)]
    assert draw(Picture(title="a", panels=[panels])).startswith(b"\x89PNG")
    assert drawn == [(0, 15.0)]


def test_bars_are_labelled_in_the_unit_of_their_axis() -> None:
    axes: Axes = Figure().add_subplot()
    rows = {"dense": {"attention": 3 * 2**30}}
    _draw_stack(axes, Stack("Tensors", rows, ["attention"], bytes_text, (2.0**20, "MiB")))
    assert axes.get_xlabel() == "MiB" and "3,072" in [text.get_text().strip() for text in axes.texts]
