"""The README's picture: the time of a step and the bytes that it saves, of every method and preset that was timed."""

from __future__ import annotations

import io
from typing import Any

COLOURS = {
    "light": {"ink": "#1f2933", "soft": "#7b8794", "win": "#17803d", "tie": "#7b8794", "loss": "#c2410c"},
    "dark": {"ink": "#e4e7eb", "soft": "#9aa5b1", "win": "#4ade80", "tie": "#9aa5b1", "loss": "#fb923c"},
}


def picture(steps: dict[str, Any], theme: str) -> str:
    """An SVG with its text as text, on a transparent ground, the same for the same numbers."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = sorted((row for row in steps["outcomes"] if row["step"]), key=lambda row: row["step"]["median"])
    colours = COLOURS[theme]
    settings = {"svg.hashsalt": "sparsetrain", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9, 0.34 * len(rows) + 1.3))
        figure.patch.set_alpha(0)
        bottom, height = 0.17, 0.66
        time = figure.add_axes((0.2, bottom, 0.36, height))
        saved = figure.add_axes((0.62, bottom, 0.36, height))
        speed = [row["step"]["median"] for row in rows]
        share = [row["saved_bytes"] / row["dense_saved_bytes"] for row in rows]
        verdicts = [row["step"]["verdict"] for row in rows]
        _bars(time, [row["name"] for row in rows], speed, verdicts, colours, "{:.2f}×")
        of_bytes = ["win" if x < 0.95 else "loss" if x > 1.05 else "tie" for x in share]
        _bars(saved, [""] * len(rows), share, of_bytes, colours, "{:.2f}")
        time.set_title("speed of a training step, dense LoRA = 1", color=colours["ink"], fontsize=11, loc="left")
        saved.set_title("activation bytes kept, dense LoRA = 1", color=colours["ink"], fontsize=11, loc="left")
        recipe = steps["recipe"]
        said = (
            f"{recipe['model']}, {steps['layers']} of {steps['model_layers']} layers, {recipe['seq_len']:,} tokens, "
            f"LoRA r={recipe['lora_r']}, fp32, {steps['machine']['cores']} CPU cores; timed in turns.\n"
            "Green wins, orange loses, grey is a tie. Quality is not in it."
        )
        figure.text(0.02, 0.02, said, color=colours["soft"], fontsize=8.5)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _bars(axes: Any, names: list[str], values: list[float], verdicts: list[str], colours: Any, form: str) -> None:
    axes.patch.set_alpha(0)
    axes.barh(range(len(values)), values, color=[colours[verdict] for verdict in verdicts], height=0.62)
    for at, value in enumerate(values):
        axes.text(value + 0.02, at, form.format(value), va="center", color=colours["ink"])
    axes.axvline(1, color=colours["soft"], linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(names)), names, color=colours["ink"])
    axes.set_xlim(0, 1.18 * max(values))
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
