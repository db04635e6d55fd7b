"""What `sparsetrain plan --gpus` answers: which grid of devices, and what each costs. No process group, no weights."""

from __future__ import annotations

import re
from typing import Any

from sparsetrain.cli.answer import Answer, table
from sparsetrain.cli.predict import parse_bytes
from sparsetrain.cli.prediction import IMPOSSIBLE
from sparsetrain.core.fields import shown
from sparsetrain.core.units import bytes_text

SHOWN = 12
"""Grids in the table; --json has all."""
_NAMES = {
    "gather_z": "AG z",
    "scatter_z": "RS z",
    "reduce_x": "AR x",
    "reduce_y": "AR y",
    "reduce_data": "AR data",
    "reduce_whole": "AR whole",
}


def parse_bandwidth(text: str) -> dict[str, float]:
    """`node=200GB/s,inter=100GB/s` -> bytes per second of both.

    Raises:
        ValueError: another form, or one is missing.
    """
    found: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(node|inter)\s*=\s*([0-9.]+\s*[A-Za-z]+)/s\s*", part[:100])
        if match is None or match[1] in found:
            raise ValueError(
                f"--bandwidth {shown(text)}: cannot read {shown(part)}. Write node=200GB/s,inter=100GB/s: of a device "
                "inside its node, and of a node to the others."
            )
        found[match[1]] = parse_bytes(match[2])
    if missing := {"node", "inter"} - set(found):
        raise ValueError(f"--bandwidth {shown(text)} lacks {', '.join(sorted(missing))}. Give both.")
    return found


def planned_grids(
    asked: dict[str, Any], gpus: int, per_node: int | None, bandwidth: str | None, memory: str | None, gpu: str | None
) -> Answer:
    """Price every grid of `gpus` devices.

    Args:
        asked: recipe keys: model, seq_len (2048), batch_size (sequences of a whole step, one a device if not given).
    """
    from sparsetrain.core.anatomy import describe
    from sparsetrain.hf.model.model_config import read_config
    from sparsetrain.hf.model.models import empty_model
    from sparsetrain.hf.model.opening import make_config
    from sparsetrain.parallel.cost import Network
    from sparsetrain.parallel.plan import plan_grids
    from sparsetrain.parallel.task import task_of
    from sparsetrain.planner.machines import machine_rates

    if gpus < 1 or (per_node is not None and per_node < 1):
        raise ValueError(f"--gpus {gpus} --gpus-per-node {per_node}: give 1 or more.")
    if not asked.get("model"):
        raise ValueError("--gpus needs --model: a config.json or its folder, or a name. Which model is to be trained?")
    if bandwidth is None:
        raise ValueError("--gpus needs --bandwidth, for example node=200GB/s,inter=100GB/s: what a grid costs is that.")
    speeds = parse_bandwidth(bandwidth)
    network = Network(
        devices_per_node=per_node or gpus, node_bytes_per_s=speeds["node"], inter_bytes_per_s=speeds["inter"]
    )
    known = read_config(str(asked["model"]))
    model = empty_model(make_config(dict(known.values), known.name), asked.get("task") or "lm")
    tokens, rows = int(asked.get("seq_len") or 2048), int(asked.get("batch_size") or gpus)
    task = task_of(model, describe(model), rows, tokens)
    rates = None if gpu is None else machine_rates(gpu)
    limit = parse_bytes(memory) if memory is not None else rates.memory_bytes if rates is not None else None
    return _shown(known.name, plan_grids(task, gpus, network, limit), task, network, limit)


def _shown(name: str, plan: Any, task: Any, network: Any, limit: int | None) -> Answer:
    from dataclasses import asdict

    from sparsetrain.parallel.shape import AXES

    data = {"model": name, "task": asdict(task), "network": asdict(network), "memory_bytes": limit, **plan.to_dict()}
    title = (
        f"{name}: {task.rows:,} x {task.tokens:,} tokens a step; seconds of each collective, one after the other; "
        "GB of a rank"
    )
    terms = [term for term in _NAMES if any(priced.seconds[term] for priced in plan.grids[:SHOWN])]
    columns = ["data,z,x,y", *(_NAMES[term] for term in terms), "sum s", "GB"]
    lines = [
        [
            ",".join(str(priced.shape.size(axis)) for axis in AXES),
            *(f"{priced.seconds[term]:.3g}" if priced.seconds[term] else "–" for term in terms),
            f"{priced.total_s:.3g}",
            f"{priced.memory_bytes / 1e9:.1f}",
        ]
        for priced in plan.grids[:SHOWN]
    ]
    show: list[Any] = [lambda: table(title, columns, lines, right=tuple(range(len(columns))))] if lines else []
    fit = "fit" if limit else "are possible"
    show += [f"{len(plan.grids) - SHOWN} more grids {fit}; --json lists all."] if len(plan.grids) > SHOWN else []
    if not limit:
        show.append("No memory was given, so every grid is listed: --memory 80GB leaves out what does not fit.")
    show += _refusals(plan)
    show += [
        f"{task.whole_parameters / 1e9:.2f} billion parameters (embedding, head) are whole on every rank. Activations "
        "are the linears' inputs; attention and what is recomputed are not counted.",
        "AG, RS, AR: all-gather, reduce-scatter, all-reduce over an axis. Seconds are by bandwidth alone: latency and "
        "arithmetic are left out, and much of this can hide behind it.",
    ]
    if not plan.grids:
        lean = plan.leanest
        near = f" Nearest: {lean.shape} with {bytes_text(lean.memory_bytes)} a rank." if lean is not None else ""
        show.append(f"No grid of these devices fits.{near}")
    return Answer(data=data, show=show, code=0 if plan.grids else IMPOSSIBLE)


def _refusals(plan: Any) -> list[str]:
    """Grids refused for one kind of reason share a line; its numbers are those of the first."""
    kinds: dict[str, list[Any]] = {}
    for shape, why, _ in plan.refused:
        kinds.setdefault(re.sub(r"[0-9.,]+", "#", why), []).append((shape, why))
    return [
        f"Refused: {same[0][0]}{f' and {len(same) - 1} more' if len(same) > 1 else ''}: {same[0][1]}."
        for same in kinds.values()
    ]
