"""What a command says while it runs, on stderr: a bar on a terminal, and now and then a line where there is none."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

Event = dict[str, Any]


def speaks() -> bool:
    """Is this process alone, or the first of a launcher's?"""
    return os.environ.get("RANK", "0") == "0"


def to_stderr(event: Event) -> None:
    """Print notes; for commands without a bar."""
    if event["event"] == "note":
        print(event["text"], file=sys.stderr, flush=True)


@contextmanager
def telling(notes: Iterable[str] = ()) -> Iterator[Callable[[Event], None]]:
    """A function to report events to: a progress bar, or lines in a pipe or a log file; of a launcher's processes the
    first one's. It is told the notes."""
    from sparsetrain.runs.progress import ProgressBar

    if not speaks():
        yield lambda _event: None
        return
    with ProgressBar() as bar:
        tell = bar if bar.console.is_terminal else _with_lines(bar)
        for text in notes:
            tell({"event": "note", "text": text})
        yield tell


def _with_lines(bar: Callable[[Event], None]) -> Callable[[Event], None]:
    """Notes and qualities as the bar prints them, and a line for the first step, each tenth, and each half minute."""
    printed_at: dict[str, float] = {}

    def tell(event: Event) -> None:
        bar(event)
        if event["event"] != "step":
            return
        side, step, steps = event.get("side", ""), event["step"], event["steps"]
        now = time.monotonic()
        if step % max(1, steps // 10) and now - printed_at.get(side, 0.0) < 30:
            return
        printed_at[side] = now
        speed = event["tokens"] / event["step_time_s"] if event["step_time_s"] else 0.0
        memory = f", {event['memory_bytes'] / 2**20:,.0f} MiB" if event.get("memory_bytes") else ""
        line = f"{side} step {step}/{steps}: loss {event['loss']:.3f}, {speed:,.0f} tokens/s{memory}"
        print(line.strip(), file=sys.stderr, flush=True)

    return tell


def refuse_launched(*, compares: bool, dry_run: bool, chooses: bool = False) -> None:
    """Raise ValueError for what one process alone does, where a launcher has started several."""
    count = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"
    if count == "1":
        return
    asked = {
        "--dry-run": (dry_run, "Run it without the launcher."),
        "--compare dense": (compares, "It takes two processes in turns: run it without the launcher, or train twice."),
        "--preset auto": (
            chooses,
            "It times steps of one process: give --method or --preset dense, or --recipe OUTPUT/recipe.yaml of a run "
            "that has chosen.",
        ),
    }
    for name, (given, do) in asked.items():
        if given:
            raise ValueError(f"{name} was asked of {count} ranks. {do}")
