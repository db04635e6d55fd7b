"""Names inside a run's output folder."""

from __future__ import annotations

from pathlib import Path

RECIPE, RESULT, PROGRESS = "recipe.yaml", "result.json", "progress.json"
REPORT_PAGE, REPORT_VALUES = "report.html", "report.json"
ADAPTER, MODEL = "adapter", "model"
OPTIMIZER = "optimizer.pt"
CHOICE = "choice.json"
"""What `preset: auto` weighed, and what it took."""
RUN = "run.json"
"""What a folder is of, written first: `run` or `comparison`, and the recipe."""
SPARSE, DENSE = "sparse", "dense"
SIDES = (SPARSE, DENSE)
"""Of a comparison, each in a folder of its own."""
KEPT, ENTERING = "kept", ".entering"
"""Weights kept for a later stage; what a stage begins with, until its first step is done."""
SAVED_PLACES = (ADAPTER, MODEL, f"{SPARSE}/{ADAPTER}", f"{SPARSE}/{MODEL}")
"""Where the trained adapter or model is, in the output of a run or of a comparison."""


def checkpoint_folder(output: str | Path | None, step: int) -> Path:
    """Where the Trainer writes its checkpoint of a step."""
    return Path(output or ".") / f"checkpoint-{step}"


def model_of(place: str) -> str:
    """The folder of the whole model in the output of a run or of a comparison; any other place as it is."""
    folder = Path(place)
    if (folder / RUN).is_file() and not (folder / "config.json").exists():
        for inside in (folder / MODEL, folder / SPARSE / MODEL):
            if (inside / "config.json").is_file():
                return str(inside)
    return place
