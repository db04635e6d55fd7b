"""Peak memory of a whole model's step, from the trace of one block of each kind.

The walk repeats the traced segments as often as the model has such blocks:
live(l+1) = live(l) + kept(l), peak = max over segments of (static + live + segment's peak); then the optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsetrain.core.components import COMPONENTS
from sparsetrain.planner.traced_step import Segment, StepTrace, Work


@dataclass(frozen=True, kw_only=True)
class StaticBytes:
    """Bytes that stay from step to step, counted on the full model without weights. They are exact.

    grads_by_block: gradient bytes of each block's trained parameters; the rest of `gradients` is outside the blocks.
    optimizer_on_host: what a paged optimizer may keep in the CPU's memory.
    """

    parameters_trainable: int
    parameters_frozen: int
    buffers: int
    gradients: int
    optimizer: int
    grads_by_block: tuple[int, ...]
    optimizer_on_host: int = 0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which traced block stands for each block of the model: block l is traced block `of_block[l]`."""

    of_block: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PeakBytes:
    """The peak of one training step, in bytes, and what it is made of at that moment.

    saved: component -> bytes saved for the backward at the peak. temporary: what else is live there (logits and their
    gradient, a block's intermediate results, recomputed activations).
    saved_in_full: component -> bytes at the end of the forward, whichever moment is the peak.
    phase: `forward`, `head and loss`, `backward` or `optimizer`.
    host: bytes that wait in the CPU's memory meanwhile, and are not of the total.
    """

    total: float
    phase: str
    parameters: float
    buffers: float
    gradients: float
    optimizer: float
    saved: dict[str, float]
    temporary: float
    saved_in_full: dict[str, float]
    host: float = 0.0


def peak_bytes(trace: StepTrace, layout: Layout, static: StaticBytes, *, accumulates: bool = False) -> PeakBytes:
    """Walk a step through all blocks.

    Args:
        trace: of one block of each kind.
        layout: the blocks they stand for.
        static: of the full model.
        accumulates: gradients of an earlier micro-batch are there during the forward.
    """
    fixed = static.parameters_trainable + static.parameters_frozen + static.buffers + static.optimizer
    outside = static.gradients - sum(static.grads_by_block)
    of = layout.of_block
    moments: list[tuple[float, str, int, float]] = []  # live at the peak, phase, blocks that hold saved, gradients
    grads = float(static.gradients) if accumulates else 0.0
    start = grads
    moments.append((start + trace.before.peak, "forward", 0, grads))
    live = start + trace.before.kept
    for layer, i in enumerate(of):
        moments.append((live + trace.forward[i].peak, "forward", layer + 1, grads))
        live += trace.forward[i].kept
    moments.append((live + trace.head.peak, "head and loss", len(of), grads))
    live += trace.head.kept
    grads = grads if accumulates else float(outside)
    for layer in range(len(of) - 1, -1, -1):
        segment = trace.backward[of[layer]]
        moments.append((live + segment.peak, "backward", layer + 1, grads))
        live += segment.kept
        grads += 0.0 if accumulates else static.grads_by_block[layer]
    moments.append((float(static.gradients), "optimizer", 0, float(static.gradients)))
    most, phase, holding, grads = max(moments, key=lambda moment: moment[0])
    saved = _saved(trace, of[:holding], outside=phase != "optimizer", head=phase == "head and loss")
    grads = min(grads, most)
    left = most - grads - sum(saved.values())
    if left < 0:  # the block's own share of saved tensors is not all there yet, or no longer
        scale = (most - grads) / max(1.0, sum(saved.values()))
        saved, left = {name: size * scale for name, size in saved.items()}, 0.0
    return PeakBytes(
        total=fixed + most,
        phase=phase,
        parameters=float(static.parameters_trainable + static.parameters_frozen),
        buffers=float(static.buffers),
        gradients=grads,
        optimizer=float(static.optimizer),
        saved=saved,
        temporary=left,
        saved_in_full=_saved(trace, of, outside=True, head=True),
        host=static.optimizer_on_host + sum(trace.forward[i].work.get("host", (0.0, 0.0, 0.0))[1] for i in of),
    )


def _saved(trace: StepTrace, of: tuple[int, ...], *, outside: bool, head: bool) -> dict[str, float]:
    total = dict.fromkeys(COMPONENTS, 0.0)
    if outside:
        for name, size in trace.saved.items():
            total[name] += size if head or name != "head_and_loss" else 0.0
    for i in of:
        for name, size in trace.block_saved[i].items():
            total[name] += size
    return total


def total_work(trace: StepTrace, layout: Layout) -> Work:
    """FLOPs, bytes and calls of forward and backward of the whole model, by kind of operation."""
    total: dict[str, list[float]] = {}

    def add(segment: Segment) -> None:
        for kind, numbers in segment.work.items():
            into = total.setdefault(kind, [0.0, 0.0, 0.0])
            for i, value in enumerate(numbers):
                into[i] += value

    add(trace.before)
    add(trace.head)
    for i in layout.of_block:
        add(trace.forward[i])
        add(trace.backward[i])
    return {kind: (a, b, c) for kind, (a, b, c) in total.items()}


def fit(traces: dict[int, StepTrace], tokens: int, batch: int = 1) -> StepTrace:
    """The trace at another length and batch: every number's parabola through three traced lengths.

    v(b, T) = c + b·(v(1, T) - c), c = v(1, 0): bytes and FLOPs of a step are polynomials of the length (attention's
    FLOPs have degree 2) but for rounding to blocks and tiles, and what does not grow with tokens is there once.
    """
    if batch == 1 and tokens in traces:
        return traces[tokens]
    if len(traces) != 3:
        raise ValueError(f"traced at {sorted(traces)} tokens; {tokens} tokens in {batch} rows need three lengths.")
    lengths, parts_of = list(traces), list(traces.values())
    weights = [batch * x + (1 - batch) * y for x, y in zip(_lagrange(lengths, tokens), _lagrange(lengths, 0))]
    first = parts_of[0]

    def mix(values: list[float]) -> float:
        return sum(weight * value for weight, value in zip(weights, values, strict=True))

    def size(values: list[float]) -> float:
        if max(values) <= 0 > min(values):  # bytes that go
            return -size([-value for value in values])
        if min(values) < 0 or _is_parabola(lengths, values):
            return mix(values)
        return _line(lengths, values, tokens, batch)

    def table(tables: list[dict[str, float]]) -> dict[str, float]:
        names = sorted({name for each in tables for name in each})
        return {name: max(0.0, size([each.get(name, 0.0) for each in tables])) for name in names}

    def segment(parts: list[Segment]) -> Segment:
        kinds = sorted({kind for part in parts for kind in part.work})  # sums in one order, whatever the hashes
        none = (0.0, 0.0, 0.0)
        work = {k: tuple(max(0.0, mix([p.work.get(k, none)[i] for p in parts])) for i in range(3)) for k in kinds}
        return Segment(size([p.kept for p in parts]), max(0.0, size([p.peak for p in parts])), work)  # type: ignore[arg-type]

    count = range(len(first.forward))
    return StepTrace(
        before=segment([t.before for t in parts_of]),
        head=segment([t.head for t in parts_of]),
        forward=tuple(segment([t.forward[i] for t in parts_of]) for i in count),
        backward=tuple(segment([t.backward[i] for t in parts_of]) for i in count),
        saved=table([t.saved for t in parts_of]),
        block_saved=tuple(table([t.block_saved[i] for t in parts_of]) for i in count),
    )


def _is_parabola(lengths: list[int], values: list[float]) -> bool:
    """Could a + b·T + c·T² with c ≥ 0 and b ≥ 0 have these values? A peak is the largest of several moments: where two
    lengths have different ones, their parabola leads to a hundred times what is there at 256k tokens. And a state space
    that runs in chunks keeps no state between chunks where there is one: its parabola bends down, to nothing."""
    (x, y, z), (u, v, w) = lengths, values
    slopes = (v - u) / (y - x), (w - v) / (z - y)
    near = 0.02 * max(map(abs, slopes))
    return slopes[0] - near <= slopes[1] <= slopes[0] * (z + y) / (y + x) + near


def _line(lengths: list[int], values: list[float], tokens: int, batch: int) -> float:
    """Through the two longest."""
    slope = (values[2] - values[1]) / (lengths[2] - lengths[1])
    start = max(0.0, values[2] - slope * lengths[2])
    return start + batch * (values[2] - start + slope * (tokens - lengths[2]))


def _lagrange(points: list[int], at: int) -> list[float]:
    weights = []
    for i, x in enumerate(points):
        weight = 1.0
        for j, other in enumerate(points):
            if j != i:
                weight *= (at - other) / (x - other)
        weights.append(weight)
    return weights
