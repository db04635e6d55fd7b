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
Quality = Annotated[bool, typer.Option("--quality", help="Also say how far the images are from the data (FID, KID).")]
Features = Annotated[
    str,
    typer.Option(
        "--features",
        metavar="trained|inception",
        help="Of --quality. trained: of a small classifier trained here on the data. inception: torchmetrics'.",
    ),
]
Columns = Annotated[int | None, typer.Option("--columns", metavar="INT", min=1, help="Of the grid.")]


@takes("data", "seed", "device", "threads")
def sample(
    run: Run,
    num: Num = 64,
    output: Output = Path("grid.png"),
    steps: Steps = 50,
    guidance: Guidance = 1.0,
    label: Class = None,
    columns: Columns = None,
    quality: Quality = False,
    features: Features = "trained",
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

    _check(output, features)
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
    measured = _measured(run, loaded.model, images, flags["data"], features, steps) if quality else None
    about |= {"quality": measured, "class": label, "seconds": seconds, "sparse": bool(loaded.handle)}
    shown = [f"Wrote {output}: {num} images of {steps} steps each, in {seconds:.1f} s"]
    if measured is not None:
        shown.append(f"FID {measured['fid']:.2f}, KID {measured['kid']:.4f}, by {measured['features']}.")
    return Answer(data=about, show=shown)


def _check(output: Path, features: str) -> None:
    """Raise ValueError for flags that no sample can be drawn with, before any is."""
    from sparsetrain.core.config import suggest
    from sparsetrain.measure.image_features import KINDS
    from sparsetrain.runs.places import check_file

    check_file(output, "--output", (".png",))
    if features not in KINDS:
        raise ValueError(f"--features {features} is unknown.{suggest(features, KINDS)} Choose from {', '.join(KINDS)}.")


def _measured(run: str, model: Any, images: Any, data: str | None, features: str, steps: int) -> Any:
    from sparsetrain.hf.data import load_images
    from sparsetrain.hf.train.image_quality import image_quality
    from sparsetrain.planner.image_sizes import image_shape
    from sparsetrain.recipes.reading import read_mapping

    recipe = Path(run) / "recipe.yaml"
    if data is None and not recipe.is_file():
        raise ValueError(f"--quality compares with images, and {run} has no recipe.yaml that names any. Give --data.")
    bundle = load_images(data or read_mapping(recipe)["data"], image=image_shape(model.config), captions=True)
    return image_quality(images, bundle, kind=features, steps=steps)
