"""An outline: what is known of one recipe on one model, enough to predict any length and batch; stored as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsetrain.core.remembered import recall, remember
from sparsetrain.planner.memory import Layout, PeakBytes, StaticBytes, fit, peak_bytes, total_work
from sparsetrain.planner.traced_step import Segment, StepTrace, Work


@dataclass(frozen=True, kw_only=True)
class Outline:
    """One recipe's training step on one model.

    traces: tokens -> the step of one block of each kind, one row in the batch.
    ops: the operations that chose a backend.
    parameters: of the dense model. trained: numbers that receive gradients.
    """

    traces: dict[int, StepTrace]
    layout: Layout
    static: StaticBytes
    ops: tuple[str, ...]
    parameters: int
    trained: int

    def how(self, tokens: int, batch: int = 1) -> str:
        """Whether a length was traced itself or fitted."""
        if batch == 1 and tokens in self.traces:
            return "traced"
        return f"fitted at {', '.join(f'{n:,}' for n in self.traces)} tokens"

    def peak(self, tokens: int, batch: int = 1, *, accumulates: bool = False) -> PeakBytes:
        """Peak memory of a step."""
        return peak_bytes(fit(self.traces, tokens, batch), self.layout, self.static, accumulates=accumulates)

    def work(self, tokens: int, batch: int = 1) -> Work:
        """Work of a forward and backward."""
        return total_work(fit(self.traces, tokens, batch), self.layout)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Outline:
        """Rebuild an outline.

        Raises:
            ValueError, KeyError, TypeError: the text is none.
        """
        values = json.loads(text)
        static = values["static"] | {"grads_by_block": tuple(values["static"]["grads_by_block"])}
        return cls(
            traces={int(tokens): _trace(trace) for tokens, trace in values["traces"].items()},
            layout=Layout(of_block=tuple(values["layout"]["of_block"])),
            static=StaticBytes(**static),
            ops=tuple(values["ops"]),
            parameters=values["parameters"],
            trained=values["trained"],
        )


def _trace(values: dict[str, Any]) -> StepTrace:
    return StepTrace(
        before=_segment(values["before"]),
        forward=tuple(map(_segment, values["forward"])),
        head=_segment(values["head"]),
        backward=tuple(map(_segment, values["backward"])),
        saved=values["saved"],
        block_saved=tuple(values["block_saved"]),
    )


def _segment(values: dict[str, Any]) -> Segment:
    work = {kind: (numbers[0], numbers[1], numbers[2]) for kind, numbers in values["work"].items()}
    return Segment(values["kept"], values["peak"], work)


def load_outline(path: Path) -> Outline | None:
    """A stored outline; None when there is none, or it is not what was stored (it is then made again)."""
    text = recall(path)
    try:
        return None if text is None else Outline.from_json(text)
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def store_outline(outline: Outline, path: Path) -> None:
    """Write it whole or not at all; a folder that cannot be written costs only the time of the next trace."""
    remember(path, outline.to_json())
