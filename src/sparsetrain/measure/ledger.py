"""The ledger of a run whose models change: what each step costs in FLOPs, whichever model it trains.

A token costs 6 N + 12 · layers · width · sequence FLOPs in forward and backward, N being the parameters outside the
embeddings and the output head (arXiv 2001.08361, section 2.1; 2204.02311, appendix B, for the attention). What an edit
of a method saves is not in it.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import Any

from torch import nn

from sparsetrain.core.anatomy import describe
from sparsetrain.core.units import number_text, seconds_text
from sparsetrain.measure.curves import eval_curve, number, run_seconds
from sparsetrain.measure.schema import Ledger, ModelSize, Run, StageCost

_LOOKED_UP = ("vocab", "positions", "types")


def size_of(model: nn.Module, row_tokens: int) -> ModelSize:
    """The size of a model as the ledger has it.

    Args:
        model: with weights or without.
        row_tokens: tokens in a row.
    """
    anatomy = describe(model)
    width = next((ffn.hidden_size for ffn in anatomy.ffns), 0)
    counted = [
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not set(_LOOKED_UP) & set(anatomy.axes.get(name, ()))
    ]
    layers = len(anatomy.blocks)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": layers,
        "width": width,
        "flops_per_token": 6 * sum(counted) + 12 * layers * width * row_tokens,
    }


def size_text(size: Any) -> str:
    """'4 layers x 128, 0.83 million parameters'"""
    millions = size["parameters"] / 1e6
    return f"{size['layers']} layers x {size['width']}, {millions:,.{0 if millions >= 100 else 2}f} million parameters"


def stage_memory(cost: StageCost) -> tuple[float, float | None]:
    """(bytes that a stage held, bytes planned): at a GPU's peak; else what lasts and what a step keeps."""
    planned = cost.get("planned")
    if cost["peak_bytes"] is not None:
        return cost["peak_bytes"], None if planned is None else planned["peak_bytes"]
    held = cost["static_bytes"] + cost["saved_bytes"]
    return held, None if planned is None else planned["static_bytes"] + planned["saved_bytes"]


def flops_text(flops: float) -> str:
    """'3.1 TFLOP'"""
    for unit, name in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if flops >= unit:
            return f"{flops / unit:,.3g} {name}"
    return f"{flops / 1e6:,.3g} MFLOP"


def charged(runs: dict[str, Run]) -> dict[str, Run]:
    """The runs with the key `flops`, what has been spent so far, in every step and evaluation, and `tokens_seen`.

    A run of one stage trains the model that the other ends with. Nothing where no run has stages.
    """
    staged = [stages for run in runs.values() if (stages := run.get("stages"))]
    if not staged or "flops_per_token" not in staged[0][-1]:
        return {}
    return {name: _charged(run, run.get("stages") or [staged[0][-1]]) for name, run in runs.items()}


def _charged(run: Run, stages: list[Any]) -> Run:
    ends = [stage["to_step"] for stage in stages]
    costs = [
        row["tokens"] * stages[min(bisect_left(ends, row["step"]), len(stages) - 1)]["flops_per_token"]
        for row in run["steps"]
    ]
    spent, seen = (
        list(accumulate(costs, initial=0)),
        list(accumulate((row["tokens"] for row in run["steps"]), initial=0)),
    )
    steps: Any = [
        {**row, "flops": flops, "tokens_seen": tokens}
        for row, flops, tokens in zip(run["steps"], spent[1:], seen[1:], strict=True)
    ]
    at = {0: (0, 0)} | {row["step"]: (row["flops"], row["tokens_seen"]) for row in steps}
    evals: Any = [
        {**point, "flops": at[point["step"]][0], "tokens_seen": at[point["step"]][1]}
        for point in run.get("evals") or []
        if point["step"] in at
    ]
    return {**run, "steps": steps, "evals": evals}


def ledger(runs: dict[str, Run]) -> Ledger | None:
    """What a run of several stages spent to reach the held-out loss that the dense one ended with.

    None unless there are both runs, one of them with stages, and both were evaluated.
    """
    found = charged(runs)
    if set(found) != {"dense", "sparse"} or not all(run["steps"] and run.get("evals") for run in found.values()):
        return None
    dense, grown = found["dense"], found["sparse"]
    target = number(dense["evals"][-1]["loss"])  # type: ignore[typeddict-item]
    totals: Any = {name: run["steps"][-1]["flops"] for name, run in found.items()}  # type: ignore[typeddict-item]
    made: Ledger = {
        "dense_flops": totals["dense"],
        "sparse_flops": totals["sparse"],
        "target_loss": target,
        "flops_ratio": None,
        "time_ratio": None,
        "switch_share": (grown.get("switch_s") or 0.0) / (run_seconds(grown) or 1.0),
        "text": "",
    }
    flops, seconds = (_reached(grown, by, target) for by in ("flops", "wall_s"))
    spent = f"{flops_text(totals['sparse'])} in all stages, dense {flops_text(totals['dense'])}"
    if flops is None or seconds is None:
        best = min(number(point["loss"]) for point in grown["evals"])  # type: ignore[typeddict-item]
        text = f"Its loss does not come down to dense's {number_text(target)} (lowest {number_text(best)}; {spent})."
        return {**made, "text": text}
    took = run_seconds(dense)
    made["flops_ratio"], made["time_ratio"] = flops / totals["dense"], seconds / took if took else None
    text = (
        f"Reaches dense's held-out loss of {number_text(target)} with {made['flops_ratio']:.2f} of its FLOPs, after "
        f"{seconds_text(seconds)} of dense's {seconds_text(took)} ({spent})."
    )
    return {**made, "text": text}


def _reached(run: Run, by: str, target: float) -> float | None:
    """Where the held-out loss first is the target, on the line between two evaluations; None if it never is."""
    curve = eval_curve(run, by)
    x, y = curve.x, curve.y
    for i, loss in enumerate(y):
        if loss <= target:
            if i == 0 or not y[i - 1] > loss:
                return x[i]
            return x[i - 1] + (y[i - 1] - target) / (y[i - 1] - loss) * (x[i] - x[i - 1])
    return None
