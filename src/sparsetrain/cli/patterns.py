"""`sparsetrain patterns`: pictures of the attention maps and block patterns of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsetrain.cli.answer import Answer, table
from sparsetrain.cli.flags import Debug, Json

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's --output, one of its checkpoints, or a saved model.")]
Output = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="Where to write; RUN/patterns if not given.")
]


def patterns(run: Run, output: Output = None, json: Json = False, debug: Debug = False) -> Answer:
    """Draw each layer's mean attention, filtered map and kept blocks (flood_fill_attention), as PNG.

    A finished run's report.html gets them too. While a run is still dense, its last probe is shown.

    \b
    Examples:
      sparsetrain patterns runs/pretrain
      sparsetrain patterns runs/pretrain/checkpoint-2000 --output pictures
    """
    from sparsetrain.runs.patterns import draw_patterns

    found, files = draw_patterns(run, output)
    layers = [
        {
            "site": pattern.site,
            "blocks": pattern.mean_map.shape[-1],
            "density": pattern.density,
            "switched_at_step": pattern.switched_at_step,
            "probes": 0 if pattern.history is None else len(pattern.history),
        }
        for pattern in found
    ]
    shown = [
        [
            layer["site"],
            layer["blocks"],
            "dense" if layer["density"] is None else f"{layer['density']:.1%}",
            "-" if layer["switched_at_step"] is None else layer["switched_at_step"],
            layer["probes"],
        ]
        for layer in layers
    ]
    columns = ["layer", "blocks a side", "kept", "sparse from step", "probes"]
    return Answer(
        data={"layers": layers, "files": files},
        show=[lambda: table("", columns, shown, right=(1, 2, 3, 4)), *(f"Wrote {file}" for file in files)],
    )
