"""Judgements in a sentence or two: what was won, and what to choose."""

from __future__ import annotations

from sparsetrain.core.metrics import METRICS
from sparsetrain.core.units import joined
from sparsetrain.measure.judge import LABELS
from sparsetrain.measure.schema import Judgement


def headline(judgements: list[Judgement]) -> str:
    """One or two sentences: what sparse wins, what dense wins, what is a tie."""
    won = {side: [_label(j) for j in judgements if j["winner"] == side] for side in ("sparse", "dense", "tie")}
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
    won = {j["quantity"]: j["winner"] for j in judgements if j["winner"] != "unknown"}
    if not won:
        return ""
    leaner = won.get("peak_memory", won.get("saved_activations")) == "sparse"
    faster = won.get("time_per_step") == "sparse"
    learns = won.get("loss_at_equal_time")
    recomputing = _recomputing(judgements)
    if not faster and not leaner:
        return f"Sparsity does not pay here: it is neither faster nor lower in peak memory.{recomputing} Train dense."
    if learns == "dense" and not leaner:
        return f"Steps are faster, and in the same time the dense run learns more. Train dense.{recomputing}"
    if learns == "dense":
        return "Choose sparse where memory is what you lack. Where dense fits, it learns more in the same time."
    if not faster:
        return "Choose sparse for its memory; it saves no time per step here."
    if _worse(judgements):
        saves = "Sparse saves time, and the dense model ends better. Weigh the difference in quality, or train longer."
        return saves + recomputing
    return f"Sparsity pays here.{recomputing}"


def by_checkpointing(judgement: Judgement) -> bool:
    """Dense wins this, and only with gradient checkpointing: it is memory, of which dense alone takes more."""
    found, dense = judgement.get("checkpointing"), judgement["dense"]
    memory = judgement["quantity"] == "peak_memory" and judgement["winner"] == "dense"
    return bool(memory and found and dense and found < dense)


def _label(judgement: Judgement) -> str:
    label = LABELS[judgement["quantity"]].lower()
    return f"{label} (with checkpointing)" if by_checkpointing(judgement) else label


def _recomputing(judgements: list[Judgement]) -> str:
    if any(map(by_checkpointing, judgements)):
        return " For memory alone, dense with gradient checkpointing needs less than sparse."
    return ""


def _worse(judgements: list[Judgement]) -> bool:
    """Dense ends better, surely and by more than a tie's margin."""
    for j in judgements:
        if j["quantity"] == "quality" and j["winner"] == "dense":
            d, s = j["dense"], j["sparse"]
            return d is None or s is None or abs(s - d) > METRICS[j["unit"]].margin(d)
    return False
