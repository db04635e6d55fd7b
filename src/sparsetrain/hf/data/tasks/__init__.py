"""Tasks of long sequences: generated (ListOps, Pathfinder), of embedded data (text, retrieval, pixels), or read from
the files of the Long Range Arena (arXiv 2011.04006).

Token 0 is padding in all of them. Everything is drawn from the seed alone, so the same call gives the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsetrain.core.config import suggest
from sparsetrain.hf.data.tasks import byte_text, listops, lra, pathfinder, pixels, retrieval
from sparsetrain.hf.data.tasks.bundle import TaskBundle as TaskBundle

TASKS: dict[str, Callable[..., TaskBundle]] = {
    "listops": listops.load,
    "text": byte_text.load,
    "retrieval": retrieval.load,
    "pixels": pixels.load,
    "pathfinder": pathfinder.load,
}
LRA_TASKS: dict[str, Callable[..., TaskBundle]] = {
    "lra-listops": lra.load_listops,
    "lra-text": lra.load_text,
    "lra-retrieval": lra.load_retrieval,
    "lra-image": lra.load_image,
    "lra-pathfinder": lra.load_pathfinder,
}


def load_task(
    name: str,
    *,
    seq_len: int,
    max_rows: int | None = None,
    max_eval_rows: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
) -> TaskBundle:
    """Training and held-out rows of a task.

    Args:
        name: a key of `TASKS` or `LRA_TASKS`.
        seq_len: most tokens in a sequence; what is longer is cut, and counted.
        max_rows, max_eval_rows: use this many rows, chosen by `seed`; generated tasks make 10,000 and 1,000 otherwise.
        folder: where the files of an `lra-` task lie.

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
    return known[name](seq_len=seq_len, max_rows=max_rows, max_eval_rows=max_eval_rows, seed=seed, **options)
