"""Who won where: the sparse run against the dense one, quantity by quantity, in numbers and in plain words.

A side wins where an interval excludes a tie: of the speed of steps timed in turns (`measure.timing`), of the mean
difference of loss or quality over the held-out rows (`measure.learned`). Bytes are counted, and have a margin.
"""

from __future__ import annotations

import math
from typing import Any

from sparsetrain.core.units import bytes_text, seconds_text
from sparsetrain.measure.curves import run_seconds, setup_seconds, step_seconds
from sparsetrain.measure.judgement import judgement
from sparsetrain.measure.learned import equal_steps, equal_time, quality
from sparsetrain.measure.schema import Checkpointing, Judgement, Run
from sparsetrain.measure.timing import LEVEL

TIE_TIME = 0.05
"""Of the time, for runs that were not timed in turns: those of one machine differ by as much."""
TIE_BYTES = 0.02

LABELS = {
    "time_per_step": "Time per step",
    "loss_at_equal_steps": "Loss at equal steps",
    "loss_at_equal_time": "Loss at equal time",
    "saved_activations": "Saved activations",
    "peak_memory": "Peak memory",
    "quality": "Quality after training",
}


def judge(
    runs: dict[str, Run], timing: dict[str, Any] | None = None, checkpointing: Checkpointing | None = None
) -> list[Judgement]:
    """One judgement for each of `LABELS` that both runs have numbers for; none unless there are both runs."""
    if set(runs) != {"dense", "sparse"}:
        return []
    dense, sparse = runs["dense"], runs["sparse"]
    found = [
        _time(dense, sparse, timing, checkpointing),
        equal_steps(runs),
        equal_time(runs),
        _saved(dense, sparse),
        _peak(dense, sparse, checkpointing),
        quality(dense, sparse),
    ]
    return [each for each in found if each is not None]


def _time(
    dense: Run, sparse: Run, timing: dict[str, Any] | None, checkpointing: Checkpointing | None
) -> Judgement | None:
    d, s = step_seconds(dense), step_seconds(sparse)
    if d is None or s is None:
        return None
    if sparse.get("stages"):  # no step stands for all
        d, s = (run_seconds(run) / len(run["steps"]) for run in (dense, sparse))
        text = (
            f"{_speed(d / s).capitalize()}, all steps of all models and the switches between them averaged: "
            f"{seconds_text(run_seconds(sparse))} and dense {seconds_text(run_seconds(dense))}. Up to {TIE_TIME:.0%} "
            "is a tie."
        )
        found = judgement("time_per_step", "s", d, s, text, margin=TIE_TIME * d)
    elif timing is None:
        text = (
            f"A sparse step takes {seconds_text(s)}, a dense step {seconds_text(d)}: {_speed(d / s)}. Too few steps "
            f"were timed in turns, so there is no interval, and up to {TIE_TIME:.0%} is a tie."
        )
        found = judgement("time_per_step", "s", d, s, text, margin=TIE_TIME * d)
    else:
        found = judgement("time_per_step", "s", d, s, f"{_timed(timing)}{_whole_runs(dense, sparse)}")
        # the pairs are the better witness, and have their own rule for ties
        found["ratio"] = 1 / timing["median"]
        found["winner"] = {"win": "sparse", "loss": "dense", "tie": "tie"}[timing["verdict"]]  # type: ignore[typeddict-item]
        found["low"], found["high"] = timing["low"], timing["high"]
    if checkpointing is not None:
        found["checkpointing"] = d * checkpointing["time_ratio"]
    return found


def _timed(timing: dict[str, Any]) -> str:
    """The interval of the pairs, as a sentence."""
    pairs = f"{len(timing['candidate_s'])} pairs of steps timed in turns"
    speed = _speed(timing["median"])
    if timing["low"] is None or timing["high"] is None:
        return f"{speed[0].upper()}{speed[1:]} in {pairs}: too few for an interval, so it counts as a tie."
    interval = f"{LEVEL:.0%} interval {timing['low']:.2f} to {timing['high']:.2f}, {pairs}"
    if timing["verdict"] == "tie":
        return f"Not told apart from a tie: {speed} ({interval})."
    return f"{speed[0].upper()}{speed[1:]} ({interval})."


def _whole_runs(dense: Run, sparse: Run) -> str:
    """What the runs took in all, and when the set-up is earned back; nothing for runs of unequal length."""
    if len(dense["steps"]) != len(sparse["steps"]):
        return ""
    setup, d, s = setup_seconds(sparse), run_seconds(dense), run_seconds(sparse)
    included = f", {seconds_text(setup)} of set-up included," if setup else ""
    text = f" The whole run: {seconds_text(s)} sparse{included} and {seconds_text(d)} dense."
    gained = (d - (s - setup)) / max(1, len(dense["steps"]))
    if setup and s > d and gained > 0:
        text += f" The set-up is earned back after {math.ceil(setup / gained):,} steps."
    return text


def _saved(dense: Run, sparse: Run) -> Judgement | None:
    by = [run.get("saved_activation_bytes") for run in (dense, sparse)]
    if not by[0] or not by[1]:
        return None
    d, s = sum(by[0].values()), sum(by[1].values())
    text = f"One step keeps {bytes_text(s)} of activations sparse, {bytes_text(d)} dense: {_share(s / d if d else 1)}."
    return judgement("saved_activations", "bytes", d, s, text, margin=TIE_BYTES * d)


def _peak(dense: Run, sparse: Run, checkpointing: Checkpointing | None) -> Judgement | None:
    """Against the leaner of dense and dense + checkpointing, which anyone can have."""
    for key, what in (("peak_gpu_bytes", "GPU memory"), ("peak_rss_bytes", "resident memory of the whole process")):
        d, s = dense.get(key), sparse.get(key)
        if not d or not s:
            continue
        text = f"Peak {what}: {bytes_text(s)} sparse, {bytes_text(d)} dense: {_share(s / d)}"
        beside: Any = checkpointing or {}
        own, dense_then = beside.get(key), beside.get(key.replace("peak", "dense"))
        if not own or not dense_then:
            return judgement("peak_memory", "bytes", d, s, f"{text}.", margin=TIE_BYTES * d)
        c = d * own / dense_then  # in the same few steps; the whole run's rows are longer on both sides
        best = min(c, d)
        text += f"; about {bytes_text(c)} dense + checkpointing, {_slower(beside['time_ratio'])} than dense"
        text += f": sparse takes {_share(s / c)} than that." if abs(s / c - 1) >= 0.005 else ": sparse takes the same."
        found = judgement("peak_memory", "bytes", best, s, text, margin=TIE_BYTES * best)
        return found | {"dense": d, "checkpointing": c}  # type: ignore[return-value]
    return None


def _speed(ratio: float) -> str:
    if abs(ratio - 1) < 0.005:
        return "the same speed"
    return f"{ratio:.2f}× faster" if ratio > 1 else _slower(1 / ratio)


def _slower(ratio: float) -> str:
    return f"{ratio:.2f}× slower" if ratio >= 1 else f"{1 / ratio:.2f}× faster"


def _share(ratio: float) -> str:
    if abs(ratio - 1) < 0.005:
        return "the same"
    return f"{1 - ratio:.0%} less" if ratio < 1 else f"{ratio - 1:.0%} more"
