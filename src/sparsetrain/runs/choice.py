"""What a run with `preset: auto` has chosen, in its output folder, so that it goes on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsetrain.core.errors import CheckpointError
from sparsetrain.runs.layout import CHOICE, RUN
from sparsetrain.runs.manifest import json_in


def recorded_choice(output: Path) -> dict[str, Any] | None:
    """`taken` (in words), `methods` and `recomputes` of the run in a folder; None where none has begun.

    A run that was killed before it wrote what it had chosen is known by its recipe's mark.

    Raises:
        CheckpointError: there is a choice, and it can't be read.
    """
    known = json_in(output / CHOICE)
    if known is None and (output / CHOICE).is_file():
        raise CheckpointError(
            f"{output / CHOICE} cannot be read. Give --preset dense or --method as the run was begun."
        )
    if isinstance(known, dict) and isinstance(known.get("methods"), list):
        return {"taken": "what it names", "recomputes": False} | known
    about = json_in(output / RUN)
    values = about.get("training_values") if isinstance(about, dict) else None
    if not isinstance(values, dict) or not isinstance(values.get("methods"), list):
        return None
    names = " + ".join(str(entry.get("method")) for entry in values["methods"]) or "dense"
    return {"taken": names, "methods": values["methods"], "recomputes": False}
