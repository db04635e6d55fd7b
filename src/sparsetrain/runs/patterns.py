"""The block patterns of a run, read from the state that is saved with it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sparsetrain.core.errors import CheckpointError
from sparsetrain.measure.patterns import add_pictures, draw_pattern
from sparsetrain.methods import FloodFillAttention
from sparsetrain.runs.checkpoints import checkpoints
from sparsetrain.runs.sidecar import SIDECAR, read_sidecar, read_state

FOLDER, REPORT = "patterns", "report.html"
_PLACES = ("", "adapter", "model", "sparse/adapter", "sparse/model")


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """One layer: maps and mask [p, n, n] (p = 1 if its heads share one; mask None: dense), history [probes, 3]."""

    site: str
    mean_map: Tensor
    filtered_map: Tensor
    mask: Tensor | None
    density: float | None
    switched_at_step: int | None
    history: Tensor | None


def read_patterns(run: str | Path) -> tuple[Path, list[Pattern]]:
    """(the folder that was read, its layers in order) of a run's output, a checkpoint or a saved model.

    Raises:
        CheckpointError: nothing saved there, no flood-fill attention in it, or no layer probed yet.
    """
    folder = saved_folder(Path(run))
    configs = [entry.get("method") for entry in read_sidecar(folder)["configs"]]
    method = FloodFillAttention.method
    if method not in configs:
        raise CheckpointError(f"{folder} was trained with {configs or 'no method'}, and only {method} has patterns.")
    found = []
    for key, tensors in read_state(folder).items():
        site, _, owner = key.rpartition(":")
        if owner == method and "mean_map" in tensors:
            mask, seen, switched = (tensors.get(name) for name in ("mask", "seen", "switched"))
            found.append(
                Pattern(
                    site=site,
                    mean_map=tensors["mean_map"],
                    filtered_map=tensors["filtered_map"],
                    mask=mask,
                    density=None if mask is None or seen is None else float(mask.sum() / (len(mask) * seen.sum())),
                    switched_at_step=None if switched is None else int(switched[0]),
                    history=tensors.get("history"),
                )
            )
    if not found:
        raise CheckpointError(
            f"{folder} holds no attention map: it was saved before the first probe, or with keep_ratio=1. "
            "Give a later checkpoint."
        )
    return folder, sorted(found, key=lambda pattern: [int(number) for number in re.findall(r"\d+", pattern.site)])


def draw_patterns(run: str | Path, output: str | Path | None = None) -> tuple[list[Pattern], list[Path]]:
    """Write one PNG a layer, into `RUN/patterns` if no folder is named, and put them into the run's report if any.

    Raises:
        CheckpointError: as `read_patterns`.
    """
    _, patterns = read_patterns(run)
    output = Path(run) / FOLDER if output is None else Path(output)
    output.mkdir(parents=True, exist_ok=True)
    files, pictures = [], []
    for i, pattern in enumerate(patterns):
        mask = None if pattern.mask is None else pattern.mask.numpy()
        title = f"{pattern.site}: " + (
            "dense so far"
            if pattern.density is None
            else f"{pattern.density:.1%} of the visible blocks, sparse from step {pattern.switched_at_step} on"
        )
        png = draw_pattern(pattern.mean_map.float().numpy(), pattern.filtered_map.float().numpy(), mask, title)
        files.append(output / f"layer-{i:02d}.png")
        files[-1].write_bytes(png)
        pictures.append((title, png))
    report = Path(run) / REPORT
    if report.is_file():
        page = add_pictures(report.read_text(encoding="utf-8"), pictures)
        report.write_text(page, encoding="utf-8")
        files.append(report)
    return patterns, files


def saved_folder(run: Path) -> Path:
    """Where the sidecar is: the folder itself, the model inside it, or its newest checkpoint."""
    for place in (*(run / name for name in _PLACES), *reversed(checkpoints(run) if run.is_dir() else [])):
        if (place / SIDECAR).is_file():
            return place
    raise CheckpointError(
        f"{run} holds no saved run: there is no {SIDECAR} in it, in its model or in a checkpoint. Give its --output."
    )
