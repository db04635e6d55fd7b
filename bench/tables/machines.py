"""docs/results/machines.md: where every result file was measured."""

from __future__ import annotations

import re
from typing import Any


def machines(found: dict[str, Any]) -> list[str]:
    lines = ["| result file | machine | threads | torch | transformers | commit | dtype |", "|" + " --- |" * 7]
    for name, results in sorted(found.items()):
        machine = results.get("machine", {})
        versions = machine.get("versions", machine)
        gpus = [gpu["name"] for gpu in machine.get("gpus", [])]
        cores = f"{machine['cores']} cores of " if "cores" in machine else ""
        device = re.search(r"name='([^']*)'", machine.get("device", ""))
        cpu = cores + machine["cpu"] if "cpu" in machine else device and device[1]
        cells = [
            ", ".join([*gpus, cpu] if cpu else gpus) or "not recorded",
            machine.get("threads"),
            versions.get("torch"),
            versions.get("transformers"),
            machine.get("commit"),
            results.get("dtype") or dtype_of(results),
        ]
        file = f"[{name}.json](../../bench/results/{name}.json)"
        lines.append(f"| {file} | {' | '.join('–' if cell is None else str(cell) for cell in cells)} |")
    return lines


def dtype_of(results: dict[str, Any]) -> str | None:
    """Files of before the runner have it in their rows, or nowhere: the scripts ran in fp32 on the CPU."""
    rows = results.get("results")
    return rows[0].get("dtype") if isinstance(rows, list) and rows else None
