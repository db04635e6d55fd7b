"""`sparsetrain sample`: images out of a diffusion model, as a grid."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsetrain.cli.answer import Answer
from sparsetrain.cli.flags import Debug, Json, takes
from sparsetrain.cli.live import telling

Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's --output, or a saved model's folder.")]
Num = Annotated[int, typer.Option("--num", metavar="INT", min=1, max=2**16, help="How many images.")]
Output = Annotated[Path, typer.Option("--output", metavar="FILE.png", help="The grid of all images.")]
Steps = Annotated[int, typer.Option("--steps", metavar="INT", min=1, help="Forwards of the model for each image.")]
Guidance = Annotated[
    float,
    typer.Option("--guidance", metavar="FLOAT", help="Above 1: follow the class more closely, in twice the time."),
]
Class = Annotated[
    str | None, typer.Option("--class", metavar="NAME|NUMBER", help="Of all images; each class in turn if not given.")
]
Columns = Annotated[int | None, typer.Option("--columns", metavar="INT", min=1, help="Of the grid.")]


@takes("seed", "device", "threads")
def sample(
    run: Run,
    num: Num = 64,
    output: Output = Path("grid.png"),
    steps: Steps = 50,
    guidance: Guidance = 1.0,
    label: Class = None,
    columns: Columns = None,
    json: Json = False,
    debug: Debug = False,
    **flags: Any,
) -> Answer:
    """Draw images from a model that was trained with --task diffusion, and write them as one grid.

    \b
    Examples:
      sparsetrain sample runs/pretrain --num 64 --output grid.png
      sparsetrain sample runs/pretrain --class sneaker --steps 100 --seed 1
    """
    import time

    import torch

    from sparsetrain.core.files import write_whole
    from sparsetrain.hf.model.io import load
    from sparsetrain.hf.model.sampling import label_of
    from sparsetrain.hf.model.sampling import sample as draw
    from sparsetrain.measure.pictures import image_grid
    from sparsetrain.measure.rates import device_of
    from sparsetrain.runs.places import check_file

    check_file(output, "--output", (".png",))
    if flags["threads"]:
        torch.set_num_threads(flags["threads"])
    seed = flags["seed"] or 0
    with telling() as tell:
        loaded = load(run, device=device_of(flags["device"] or "auto"))
        labels = None if label is None else [label_of(loaded.model, label)] * num
        began = time.perf_counter()
        images = draw(
            loaded.model,
            num,
            labels=labels,
            steps=steps,
            guidance=guidance,
            seed=seed,
            progress=lambda share: tell({"event": "phase", "name": "sampling", "share": share}),
        )
        seconds = time.perf_counter() - began
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, image_grid(images, columns))
    about = {"run": run, "output": output, "num": num, "steps": steps, "guidance": guidance, "seed": seed}
    about |= {"class": label, "seconds": seconds, "sparse": bool(loaded.handle)}
    return Answer(data=about, show=[f"Wrote {output}: {num} images of {steps} steps each, in {seconds:.1f} s"])
