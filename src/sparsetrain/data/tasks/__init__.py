"""Tasks of long sequences: generated (ListOps, Pathfinder), of embedded data (text, retrieval, pixels), or read from
the files of the Long Range Arena (arXiv 2011.04006).

Token 0 is padding in all of them. Everything is drawn from the seed alone, so the same call gives the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsetrain.core.config import suggest
from sparsetrain.data.tasks import byte_text, listops, lra, pathfinder, pixels, retrieval
from sparsetrain.data.tasks.rows import Embedded
from sparsetrain.data.tasks.rows import TaskRows as TaskRows

TASKS: dict[str, Callable[..., TaskRows]] = {
    "listops": listops.load,
    "text": byte_text.load,
    "retrieval": retrieval.load,
    "pixels": pixels.load,
    "pathfinder": pathfinder.load,
}
LRA_TASKS: dict[str, Callable[..., TaskRows]] = {
    "lra-listops": lra.load_listops,
    "lra-text": lra.load_text,
    "lra-retrieval": lra.load_retrieval,
    "lra-image": lra.load_image,
    "lra-pathfinder": lra.load_pathfinder,
}
OF_EMBEDDED = ("text", "retrieval", "pixels")
"""Tasks that are made of an embedded data set."""


def is_task(name: str) -> bool:
    """Whether a name is that of a generated or loaded task of long sequences."""
    return name in TASKS or name.startswith("lra-")


def read_task(
    name: str,
    *,
    seq_len: int,
    max_rows: int | None,
    max_eval_rows: int | None,
    seed: int,
    folder: str | Path | None,
    embedded: Embedded,
) -> TaskRows:
    """Training and held-out rows of a task.

    Args:
        name: a key of `TASKS` or `LRA_TASKS`.
        seq_len: most tokens in a sequence; what is longer is cut, and counted.
        max_rows, max_eval_rows: use this many rows, chosen by `seed`; generated tasks make 10,000 and 1,000 otherwise.
        folder: where the files of an `lra-` task lie.
        embedded: gives the folder of an embedded data set, for the tasks of `OF_EMBEDDED`.

    Raises:
        ValueError: no such task (with the nearest name), no folder or one too many, a broken file, or a `seq_len` the
            task cannot have.
    """
    known = TASKS | LRA_TASKS
    if name not in known:
        raise ValueError(f"no task {name!r}.{suggest(name, known)} Tasks: {', '.join(known)}.")
    if seq_len < 8:
        raise ValueError(f"{name}: seq_len={seq_len}; the shortest sequence is 8 tokens.")
    for what, rows in (("max_rows", max_rows), ("max_eval_rows", max_eval_rows)):
        if rows is not None and rows < 1:
            raise ValueError(f"{name}: {what}={rows}. Give at least 1.")
    options: dict[str, Any] = {}
    if name in LRA_TASKS:
        if folder is None:
            raise ValueError(f"{name} is read from the files of the Long Range Arena. Say where: data_folder=DIR.")
        options["folder"] = Path(folder)
    elif folder is not None:
        raise ValueError(f"{name} needs no files, and folder={folder} was given. Use lra-{name}, or leave it out.")
    elif name in OF_EMBEDDED:
        options["embedded"] = embedded
    return known[name](seq_len=seq_len, max_rows=max_rows, max_eval_rows=max_eval_rows, seed=seed, **options)
