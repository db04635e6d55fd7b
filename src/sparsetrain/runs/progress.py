"""Events on a terminal: a progress bar, and lines above it."""

from __future__ import annotations

from typing import Any, Self

from sparsetrain.core.metrics import METRICS
from sparsetrain.runs.events import Event


class ProgressBar:
    """Shows events on a terminal: one bar with loss, tokens a second and memory, and lines above it for the rest.

    Without a terminal there is no bar, and notes and qualities are plain lines. Use it as a context manager.

    Args:
        console: a rich Console, by default one on stderr.
    """

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = console or Console(stderr=True)
        columns = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        ]
        self._progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._tasks: dict[str, Any] = {}
        self._stages: dict[str, str] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        side = f"{event['side']}: " if "side" in event else ""
        kind = event["event"]
        if kind == "note":
            self._line(f"{side}{event['text']}")
        elif kind == "quality":
            shown = METRICS[event["metric"]].text(event["value"])
            stage = event["stage"].replace("_", " ")
            self._line(f"{side}{event['metric']} {stage}: {shown}")
        elif kind == "phase":
            self._show(side + event["name"], event["share"], 1.0, f"{event['share']:.0%}")
        elif kind == "step":
            speed = event["tokens"] / event["step_time_s"] if event["step_time_s"] else 0.0
            memory = event["memory_bytes"]
            figures = f"loss {event['loss']:.3f}  {speed:,.0f} tokens/s" + (
                f"  {memory / 2**20:,.0f} MiB" if memory else ""
            )
            self._show(f"{side}training", event["step"], event["steps"], figures, self._stages.get(side, ""))
        elif kind == "stage":
            self._stages[side] = f", stage {event['index'] + 1} of {event['of']}: {event['name']}"
            size = f" ({event['size']})" if "size" in event else ""
            self._line(f"{side}training{self._stages[side]}{size}")

    def _line(self, text: str) -> None:
        """Without a terminal it is not broken: a log is searched, and a command in it copied."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=not self.console.is_terminal)

    def _show(self, name: str, done: float, total: float, figures: str, stage: str = "") -> None:
        if name not in self._tasks:
            if not name.endswith("training"):  # one bar at a time for what precedes the training
                self._hide_phases()
            self._tasks[name] = self._progress.add_task(name, total=total, figures="")
        description = name + stage
        self._progress.update(self._tasks[name], description=description, completed=done, total=total, figures=figures)
        if name.endswith("training"):
            self._hide_phases()

    def _hide_phases(self) -> None:
        for name in [name for name in self._tasks if not name.endswith("training")]:
            self._progress.remove_task(self._tasks.pop(name))
