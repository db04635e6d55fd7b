"""What a run says while it runs, as events: plain dicts with the key `event`, told to one function.

A bar on a terminal, JSON lines in a pipe, or nobody listens. `note` {text}; `phase` {name, share}; `quality` {stage,
metric, value}; `stage` {name, index, of, size}, where a run trains several models; `step` {the record of a step and
what the optimizer saw}; `saved` {path}. In a comparison each has a `side`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

Event = dict[str, Any]
Report = Callable[[Event], None]


def silent(event: Event) -> None:
    """A report that tells nobody."""


def log_note(event: Event) -> None:
    """A report that logs notes, for runs without a bar."""
    if event["event"] == "note":
        logging.getLogger("sparsetrain").warning(event["text"])
