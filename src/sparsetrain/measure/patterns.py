"""Pictures of block patterns: a layer's mean attention, the map after its filter, and the blocks that are kept."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable
from html import escape
from typing import Any


def draw_pattern(mean_pnn: Any, filtered_pnn: Any, mask_pnn: Any | None, title: str) -> bytes:
    """One row of three panels a pattern, as PNG.

    Args:
        mean_pnn, filtered_pnn: arrays [p, n, n], at least 0; shown by their square root, or a few cells would hide all.
        mask_pnn: bool [p, n, n]; None while attention is dense.
        title: stands above; the layer's name.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    rows, num_blocks = len(mean_pnn), len(mean_pnn[0])
    figure = Figure(figsize=(9.6, 3.4 * rows + 0.3), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: nothing global is touched
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(rows, 3, squeeze=False)
    for i, (mean, filtered) in enumerate(zip(mean_pnn, filtered_pnn, strict=True)):
        which = f", pattern {i}" if rows > 1 else ""
        for place, picture, name in ((0, mean, "mean attention"), (1, filtered, "after the diagonal filter")):
            norm = PowerNorm(0.5, vmin=0, vmax=max(float(picture.max()), 1e-12))
            axes[i][place].imshow(picture, cmap="viridis", norm=norm, interpolation="nearest")
            axes[i][place].set_title(name + which, fontsize=9)
        mask = None if mask_pnn is None else mask_pnn[i]
        kept = "dense so far" if mask is None else f"{int(mask.sum())} of {num_blocks}² blocks kept"
        shown = mean * 0 if mask is None else mask
        axes[i][2].imshow(shown, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        axes[i][2].set_title(kept + which, fontsize=9)
    for axis in axes.flat:
        axis.set_xlabel("key block", fontsize=8)
        axis.set_ylabel("query block", fontsize=8)
        axis.tick_params(labelsize=7)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def add_pictures(
    page: str, pictures: Iterable[tuple[str, bytes]], *, name: str = "patterns", heading: str = "Attention patterns"
) -> str:
    """A report's HTML with the pictures as a section of its own, in place of an earlier one of that name.

    Raises:
        ValueError: the text is no report of ours.
    """
    figures = "".join(
        f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'
        f"<figcaption>{escape(title)}</figcaption></figure>"
        for title, png in pictures
    )
    section = f'<section id="{name}"><h2>{escape(heading)}</h2><div class="figures">{figures}</div></section>'
    page = re.sub(rf'<section id="{name}">.*?</section>\n?', "", page, flags=re.S)
    before, end, after = page.rpartition("\n</main>")
    if not end:
        raise ValueError(
            "the page has no <main>, so it is not a report that sparsetrain wrote. Write the report again."
        )
    return f"{before}\n{section}{end}{after}"
