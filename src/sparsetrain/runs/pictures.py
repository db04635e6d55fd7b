"""The pictures that the methods of a run have, drawn from the state that is saved with it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from sparsetrain.core.config import MethodConfig, registered_methods
from sparsetrain.core.errors import CheckpointError
from sparsetrain.core.files import write_whole
from sparsetrain.core.pictures import Gallery
from sparsetrain.measure.pictures import draw
from sparsetrain.measure.report import load_report, write_report
from sparsetrain.measure.schema import ShownGallery
from sparsetrain.runs.checkpoints import checkpoints
from sparsetrain.runs.layout import REPORT_VALUES, SAVED_PLACES
from sparsetrain.runs.sidecar import SIDECAR, read_sidecar, read_state
from sparsetrain.surgery.method import method_of, site_of


def illustrate(run: str | Path, configs: Sequence[MethodConfig]) -> None:
    """Add the pictures of a run's methods to its report; a run that has none yet is left as it is."""
    if any(method_of(config).pictures for config in configs):
        with contextlib.suppress(CheckpointError):
            draw_pictures(run)


def draw_pictures(run: str | Path, output: str | Path | None = None) -> tuple[list[Gallery], list[Path]]:
    """Write every picture as PNG; those that lie in the run's folder enter its report, if it has one.

    Args:
        run: a run's output, a checkpoint or a saved model.
        output: folder for the files; `RUN/<name of the gallery>` if not given.

    Returns:
        The galleries, and the files that were written.

    Raises:
        CheckpointError: as `read_galleries`.
        ValueError: as `load_report`.
    """
    galleries, files = read_galleries(run), []
    shown: dict[str, ShownGallery] = {}
    for gallery in galleries:
        folder = Path(run) / gallery.name if output is None else Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        titles = {}
        for i, picture in enumerate(gallery.pictures):
            files.append(folder / f"{gallery.item}-{i:02d}.png")
            write_whole(files[-1], draw(picture))
            titles[f"{gallery.name}/{files[-1].name}"] = picture.title
        shown[gallery.name] = {"heading": gallery.heading, "files": titles}
    report = Path(run) / REPORT_VALUES
    if output is None and report.is_file():
        values = load_report(report)
        values["galleries"] = values.get("galleries", {}) | shown
        files.append(write_report(values, run)[1])
    return galleries, files


def read_galleries(run: str | Path) -> list[Gallery]:
    """The pictures of a saved run's methods.

    Raises:
        CheckpointError: nothing is saved there, no method of it has pictures, or there is nothing to show yet.
    """
    folder = saved_folder(Path(run))
    methods = [str(entry.get("method")) for entry in read_sidecar(folder)["configs"]]
    drawing = {name: made for name, kind in registered_methods().items() if (made := method_of(kind).pictures)}
    if not drawing.keys() & set(methods):
        raise CheckpointError(
            f"{folder} was trained with {methods or 'no method'}, and only {' and '.join(drawing)} have pictures."
        )
    state = read_state(folder)
    found = []
    for method in (name for name in methods if name in drawing):
        own = {site: tensors for key, tensors in state.items() if (site := site_of(key, method)) is not None}
        if (gallery := drawing[method](own)) is not None:
            found.append(gallery)
    if not found:
        raise CheckpointError(
            f"{folder} holds nothing to draw: it was saved before the first probe or the second refresh, or its "
            "methods keep everything. Give a later checkpoint."
        )
    return found


def saved_folder(run: Path) -> Path:
    """Where the sidecar is: the folder itself, the model inside it, or its newest checkpoint."""
    places = [run, *(run / name for name in SAVED_PLACES), *reversed(checkpoints(run) if run.is_dir() else [])]
    for place in places:
        if (place / SIDECAR).is_file():
            return place
    raise CheckpointError(
        f"{run} holds no saved run: there is no {SIDECAR} in it, in its model or in a checkpoint. Give its --output."
    )
