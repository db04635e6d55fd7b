"""What `sparsetrain doctor --network` answers: the bandwidths that `plan --gpus` asks for, measured between ranks."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from sparsetrain.cli.answer import Answer, table
from sparsetrain.cli.live import speaks
from sparsetrain.core.units import bytes_text


def network_answer() -> Answer | None:
    """Measure the network between the launcher's ranks; the first one answers.

    Raises:
        ValueError: this is one process.
    """
    import torch

    from sparsetrain.parallel.network import measure_network
    from sparsetrain.runs.launch import joined

    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    with joined():
        gpu = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        found = measure_network(local, device)
    if not speaks():
        return None
    links = {"inside a node": found.node, "between nodes": found.inter}
    rows = [
        [name, link.ranks, bytes_text(size)]
        + [f"{number:.3g}" for number in (seconds * 1e3, link.bytes_per_s(size) / 1e9, link.gathers[size] * 1e3)]
        for name, link in links.items()
        if link is not None
        for size, seconds in link.seconds.items()
    ]
    title = f"Messages on {device.type}, {found.nodes} x {found.devices_per_node} ranks"
    heads = ["where", "ranks", "size", "all-reduce, ms", "GB/s", "all-gather, ms"]
    show: list[Any] = [
        lambda: table(title, heads, rows, right=(1, 2, 3, 4, 5)),
        f"Latency of an all-reduce among all ranks: {found.latency_s * 1e6:,.0f} µs.",
        f"For the planner: sparsetrain plan --gpus N --bandwidth {found.flag}",
    ]
    if found.inter is None:
        show.append("Between nodes nothing was measured: this is one. Start torchrun on two, with --nnodes 2.")
    return Answer(data={"network": asdict(found), "bandwidth": found.flag}, show=show)
