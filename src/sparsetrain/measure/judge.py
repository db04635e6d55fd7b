"""Who won where: the sparse run against the dense one, quantity by quantity, in numbers and in plain words."""

from __future__ import annotations

import math
from typing import Any

from sparsetrain.core.metrics import METRICS, TIE_LOSS
from sparsetrain.core.units import bytes_text, joined, number_text, seconds_text
from sparsetrain.measure.curves import Curve, loss_curves, number, setup_seconds, step_seconds
from sparsetrain.measure.schema import Judgement, Run

# Within these a difference is called a tie.
TIE_TIME = 0.05  # of the time, for runs that were not interleaved
TIE_BYTES = 0.02  # of the bytes

LABELS = {
    "time_per_step": "Time per step",
    "loss_at_equal_steps": "Loss at equal steps",
    "loss_at_equal_time": "Loss at equal time",
    "saved_activations": "Saved activations",
    "peak_memory": "Peak memory",
    "quality": "Quality after training",
}


def judge(runs: dict[str, Run], timing: dict[str, Any] | None = None) -> list[Judgement]:
    """One judgement for each of `LABELS` that both runs have numbers for; none unless there are both runs."""
    if set(runs) != {"dense", "sparse"}:
        return []
    dense, sparse = runs["dense"], runs["sparse"]
    found = [
        _time(dense, sparse, timing),
        _equal_steps(runs),
        _equal_time(runs),
        _saved(dense, sparse),
        _peak(dense, sparse),
        _quality(dense, sparse),
    ]
    return [judgement for judgement in found if judgement is not None]


def headline(judgements: list[Judgement]) -> str:
    """One or two sentences: what sparse wins, what dense wins, what is a tie."""
    won = {
        side: [LABELS[j["quantity"]].lower() for j in judgements if j["winner"] == side]
        for side in ("sparse", "dense", "tie")
    }
    decided = sum(map(len, won.values()))
    for side in ("sparse", "dense"):
        if decided > 1 and len(won[side]) == decided:
            return f"{side.capitalize()} wins on everything that was measured: {joined(won[side])}."
    parts = [f"{side.capitalize()} wins on {joined(won[side])}." for side in ("sparse", "dense") if won[side]]
    if won["tie"]:
        parts.append(f"A tie on {joined(won['tie'])}.")
    return " ".join(parts)


def advice(judgements: list[Judgement]) -> str:
    """What follows from the judgements, for someone who has to choose."""
    won = {j["quantity"]: j["winner"] for j in judgements}
    leaner = won.get("peak_memory", won.get("saved_activations")) == "sparse"
    faster = won.get("time_per_step") == "sparse"
    learns = won.get("loss_at_equal_time", won.get("loss_at_equal_steps"))
    worse = won.get("quality") == "dense"
    if not won:
        return ""
    if not faster and not leaner:
        return "Sparsity does not pay here: it is neither faster nor lower in peak memory. Train dense."
    if learns == "dense" and not leaner:
        return "The steps are faster, but in the same time the dense run learns more. For the result, train dense."
    if learns == "dense":
        return "Choose sparse where memory is what you lack. Where dense fits, it learns more in the same time."
    if not faster:
        return "Choose sparse for its memory; it saves no time per step here."
    if worse:
        return "Sparse saves time, and the dense model ends better. Weigh the difference in quality, or train longer."
    return "Sparsity pays here."


def _judgement(
    quantity: str, unit: str, dense: float, sparse: float, text: str, *, margin: float, more_is_better: bool = False
) -> Judgement:
    """`margin`: an absolute difference up to it is a tie. A value that is not a number loses to one that is."""
    finite = {"dense": math.isfinite(dense), "sparse": math.isfinite(sparse)}
    if not all(finite.values()):
        winner = next((side for side, good in finite.items() if good), "unknown")
    elif abs(sparse - dense) <= margin:
        winner = "tie"
    else:
        winner = "sparse" if (sparse > dense) == more_is_better else "dense"
    ratio = sparse / dense if all(finite.values()) and dense else None
    return {
        "quantity": quantity,
        "unit": unit,
        "dense": dense if finite["dense"] else None,
        "sparse": sparse if finite["sparse"] else None,
        "ratio": ratio,
        "winner": winner,  # type: ignore[typeddict-item]
        "text": text,
    }


def _time(dense: Run, sparse: Run, timing: dict[str, Any] | None) -> Judgement | None:
    d, s = step_seconds(dense), step_seconds(sparse)
    if d is None or s is None:
        return None
    if timing is None:
        text = f"A sparse step takes {seconds_text(s)}, a dense step {seconds_text(d)}: {_speed(d / s)}."
        return _judgement("time_per_step", "s", d, s, text, margin=TIE_TIME * d)
    text = (
        f"{_speed(timing['median']).capitalize()} in steps timed alternately (quartiles {timing['q1']:.2f} to "
        f"{timing['q3']:.2f}); in the runs, {seconds_text(s)} sparse and {seconds_text(d)} dense."
    )
    found = _judgement("time_per_step", "s", d, s, text, margin=0.0)
    # the interleaved ratio is the better witness, and has its own rule for ties
    found["ratio"] = 1 / timing["median"]
    found["winner"] = {"win": "sparse", "loss": "dense", "tie": "tie"}[timing["verdict"]]  # type: ignore[typeddict-item]
    return found


def _equal_steps(runs: dict[str, Run]) -> Judgement | None:
    curves, what = loss_curves(runs, "step")
    if not all(curve.x for curve in curves.values()):
        return None
    step = min(curve.x[-1] for curve in curves.values())
    return _losses("loss_at_equal_steps", curves, step, f"{what} after {step:.0f} steps")


def _equal_time(runs: dict[str, Run]) -> Judgement | None:
    curves, what = loss_curves(runs, "wall_s")
    if not all(curve.x for curve in curves.values()):
        return None
    ends = {name: curve.x[-1] for name, curve in curves.items()}
    shorter = min(ends, key=lambda name: ends[name])
    longer = "sparse" if shorter == "dense" else "dense"
    setup = setup_seconds(runs["sparse"])
    included = f", {seconds_text(setup)} of set-up included" if setup else ""
    after = f"{what} after {seconds_text(ends[shorter])}{included}"
    found = _losses("loss_at_equal_time", curves, ends[shorter], after)
    if found is None:
        text = (
            f"The {shorter} run was over ({seconds_text(ends[shorter])}) before the {longer} run had its first loss "
            f"({seconds_text(curves[longer].x[0])}{included if longer == 'sparse' else ''})."
        )
        values = {shorter: curves[shorter].y[-1], longer: math.nan}
        found = _judgement("loss_at_equal_time", "nats", values["dense"], values["sparse"], text, margin=TIE_LOSS)
    return found


def _losses(quantity: str, curves: dict[str, Curve], x: float, what: str) -> Judgement | None:
    d, s = curves["dense"].at(x), curves["sparse"].at(x)
    if d is None or s is None:
        return None
    text = f"{what[0].upper()}{what[1:]}: {number_text(s)} sparse, {number_text(d)} dense{_difference(s - d)}."
    return _judgement(quantity, "nats", d, s, text, margin=TIE_LOSS)


def _saved(dense: Run, sparse: Run) -> Judgement | None:
    by = [run.get("saved_activation_bytes") for run in (dense, sparse)]
    if not by[0] or not by[1]:
        return None
    d, s = sum(by[0].values()), sum(by[1].values())
    text = f"One step keeps {bytes_text(s)} of activations sparse, {bytes_text(d)} dense: {_share(s / d if d else 1)}."
    return _judgement("saved_activations", "bytes", d, s, text, margin=TIE_BYTES * d)


def _peak(dense: Run, sparse: Run) -> Judgement | None:
    for key, what in (("peak_gpu_bytes", "GPU memory"), ("peak_rss_bytes", "resident memory of the whole process")):
        d, s = dense.get(key), sparse.get(key)
        if d and s:
            text = f"Peak {what}: {bytes_text(s)} sparse, {bytes_text(d)} dense: {_share(s / d)}."
            return _judgement("peak_memory", "bytes", d, s, text, margin=TIE_BYTES * d)
    return None


def _quality(dense: Run, sparse: Run) -> Judgement | None:
    """The metric that the runs' task is judged by; the first of the table where an earlier version did not say it."""
    said = sparse.get("metric")
    for name in [said] if said in METRICS else METRICS:
        d, s = (_stage(run, name) for run in (dense, sparse))
        if d is None or s is None:
            continue
        metric = METRICS[name]
        apart = "" if metric.is_share or not d else _percent(s / d)
        text = f"{metric.title} after training: {metric.text(s)} sparse, {metric.text(d)} dense{apart}."
        margin = metric.margin(d)
        return _judgement("quality", name, d, s, text, margin=margin, more_is_better=metric.more_is_better)
    return None


def _stage(run: Run, metric: str) -> float | None:
    """The metric after training: from the stages, else from the last evaluation; NaN where it diverged."""
    stages: dict[str, Any] = run.get(metric) or {}  # type: ignore[assignment]
    if "after_training" in stages:
        return number(stages["after_training"])
    evals = run.get("evals") or []
    return number(evals[-1][metric]) if evals and metric in evals[-1] else None


def _speed(ratio: float) -> str:
    if abs(ratio - 1) < 0.005:
        return "the same speed"
    return f"{ratio:.2f}× faster" if ratio > 1 else f"{1 / ratio:.2f}× slower"


def _share(ratio: float) -> str:
    if abs(ratio - 1) < 0.005:
        return "the same"
    return f"{1 - ratio:.0%} less" if ratio < 1 else f"{ratio - 1:.0%} more"


def _difference(value: float) -> str:
    return f" ({value:+.3f})" if math.isfinite(value) else ""


def _percent(ratio: float) -> str:
    return f" ({ratio - 1:+.1%})" if math.isfinite(ratio) else ""
