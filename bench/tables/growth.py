"""Tables of runs in which the model changes its size: what they cost to the ordinary run's final loss."""

from __future__ import annotations

import statistics
from typing import Any

from bench.tables.format import signed
from bench.tables.linears import DASH, head, line, mean_of, seeds_of


def multi_level(results: dict[str, Any]) -> list[str]:
    """Every arm beside the ordinary run of its seed."""
    runs = seeds_of(results["results"])
    lines = head(
        "arm",
        "seeds",
        "held-out loss",
        "less the ordinary's",
        "FLOPs of its run",
        "FLOPs to its loss",
        "processor time to its loss",
        "switching itself",
    )
    for arm, own in runs.items():
        ordinary = runs.get("ordinary", {})
        spent = [own[seed]["flops"] / ordinary[seed]["flops"] for seed in own if seed in ordinary]
        differences = [run["loss_over_ordinary"] for run in own.values() if "loss_over_ordinary" in run]
        less = signed(differences) if differences else DASH
        share = f"{statistics.mean(spent):.2f}" if spent else DASH
        until = [_reached(own, f"{key}_ratio") for key in ("flops", "cpu_s")]
        switching = [run["switch_s"] / run["time_s"] for run in own.values() if run.get("switch_s")]
        until.append(f"{statistics.mean(switching):.2%}" if switching else DASH)
        lines.append(line(arm, len(own), mean_of(own, "loss"), less, share, *until))
    return lines


def _reached(runs: dict[str, Any], key: str) -> str:
    """The mean of the seeds that came to the loss, and how many did not."""
    values = [run.get(key) for run in runs.values()]
    reached = [value for value in values if value is not None]
    if not reached:
        return DASH if all(key not in run for run in runs.values()) else "not reached"
    missed = len(values) - len(reached)
    return f"{statistics.mean(reached):.2f}" + (f" ({missed} not)" if missed else "")


def masked_growth(results: dict[str, Any]) -> list[str]:
    """By model: every arm and share of the ordinary run's FLOPs."""
    runs, lines = seeds_of(results["results"]), []
    for model in dict.fromkeys(name.partition(" ")[0] for name in runs):
        lines += [*([""] if lines else []), f"**{model}**", ""]
        lines += head(
            "arm",
            "FLOPs of the ordinary run",
            "seeds",
            "held-out loss",
            "less the ordinary's",
            "FLOPs to its loss",
            "processor time of its run",
            "processor time to its loss",
            "growing itself",
        )
        for name, own in runs.items():
            kind, _, rest = name.partition(" ")
            if kind != model:
                continue
            arm, _, share = rest.rpartition(" ")
            differences = [run["loss_less_ordinary"] for run in own.values() if "loss_less_ordinary" in run]
            told = [run for run in own.values() if "of_its" in run]
            beside = {
                seed
                for seed in own
                if _processor(results, f"{name} {seed}") == _processor(results, f"{model} ordinary 1 {seed}")
            }
            flops = _mean_reached(told, "flops")
            growing = f"{statistics.mean(run['growing_share'] for run in told):.1%}" if told else DASH
            told = [run for seed, run in own.items() if seed in beside and "of_its" in run]
            took = f"{statistics.mean(run['of_its']['cpu_s'] for run in told):.2f}" if told else DASH
            until = _mean_reached(told, "cpu_s")
            less = signed(differences) if differences else DASH
            lines.append(line(arm, share, len(own), mean_of(own, "loss"), less, flops, took, until, growing))
    return lines


def _mean_reached(runs: list[dict[str, Any]], key: str) -> str:
    """Of what the ordinary run took, up to its loss."""
    reached = [run["reached_at"][key] for run in runs if run["reached_at"]]
    missed = len(runs) - len(reached)
    if not reached:
        return "not reached" if runs else DASH
    return f"{statistics.mean(reached):.2f}" + (f" ({missed} not)" if missed else "")


def _processor(results: dict[str, Any], key: str) -> tuple[Any, ...]:
    """What a cell was measured on: seconds of two kinds are not compared."""
    earlier = (run["machine"] for run in results.get("earlier", ()) if key in run["cells"])
    machine = next(earlier, results.get("machine", {}))
    return machine.get("cpu"), tuple(machine.get("cpu_flags") or ())


def conclude_multi_level(found: dict[str, Any]) -> str:
    said = []
    for task in ("gpt", "bert", "vit"):
        runs = seeds_of(found.get(f"multi_level_{task}", {"results": {}})["results"])
        if own := runs.get("v-cycle"):
            flops, time = (_reached(own, f"{key}_ratio") for key in ("flops", "cpu_s"))
            said.append(f"{task}: FLOPs {flops}, processor time {time}")
    if not said:
        return "Not measured yet: `python -m bench run multi_level_gpt`."
    return f"To the ordinary run's final loss a V-cycle took, of what that run took: {'; '.join(said)}."


def conclude_masked_growth(found: dict[str, Any]) -> str:
    said = []
    for name, own in seeds_of(found.get("masked_growth", {"results": {}})["results"]).items():
        if " grown " in name:
            less = [run["loss_less_ordinary"] for run in own.values() if "loss_less_ordinary" in run]
            model, share = name.split(" grown ")
            said += [f"{model} {signed(less)} at {share} of its FLOPs"] if less else []
    if not said:
        return "Not measured yet: `python -m bench run masked_growth`."
    return f"A growing model's held-out loss less the ordinary run's: {'; '.join(said)}."


def conclude_growth(found: dict[str, Any]) -> str:
    said = [conclude_multi_level(found), conclude_masked_growth(found)]
    return " ".join(said)
