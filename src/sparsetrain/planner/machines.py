"""What a machine can do, as a few rates: the built-in ones (machines.json, with their sources) or one measured here.

`sparsetrain bench` writes the same layout, so that `plan --gpu measured.json` answers for the user's own machine:

    {"machine": "H100", "gemm_flops": {"bf16": 6.2e14}, "copy_bytes_per_s": 2.9e12, "attention_flops": 5.0e14,
     "methods": {"some_method": [{"tokens": 4096, "hidden": 4096, "speedup": 1.6}]}}
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from sparsetrain.core.config import suggest
from sparsetrain.core.fields import checked, field_hints, kind_of, shown
from sparsetrain.core.files import to_json, write_whole
from sparsetrain.core.plain_files import read_plain_object
from sparsetrain.core.quote import quoted

DTYPES = ("fp32", "bf16")
RESERVE_BYTES = {"cpu": 450_000_000, "gpu": 600_000_000}
"""What a process holds beside tensors: interpreter and libraries on a CPU, context and kernels on a GPU."""


@dataclass(frozen=True, kw_only=True)
class MachineRates:
    """Rates that a training step reaches, not peaks of a data sheet.

    Args:
        machine: its name, for people.
        gemm_flops: dtype (`fp32`, `bf16`) -> FLOP/s of a large matrix product.
        copy_bytes_per_s: bytes read and written per second by an elementwise operation.
        attention_flops: FLOP/s of dense fused attention, forward and backward together, causal pairs counted once.
        exp_per_s: exponentials per second, where they bound softmax and activations (CPU); None: bytes bound them.
        call_s: seconds an operation costs however small it is.
        host_bytes_per_s: bytes moved per second between a GPU and the CPU's pinned memory.
        memory_bytes: what a process may use; None: not known.
        methods: method -> what was timed here: the shape, and `speedup`, dense time / sparse time of the part that the
            method replaces (tokens: the sequence length).
        source: where the rates come from.
        measured: measured on that very machine by this package.
    """

    machine: str
    gemm_flops: dict[str, float]
    copy_bytes_per_s: float
    attention_flops: float
    exp_per_s: float | None = None
    call_s: float = 0.0
    host_bytes_per_s: float = 2.0e10
    memory_bytes: int | None = None
    methods: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    source: str = ""
    measured: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        rates = {"copy_bytes_per_s": self.copy_bytes_per_s, "attention_flops": self.attention_flops}
        rates |= {f"gemm_flops[{name}]": value for name, value in self.gemm_flops.items()}
        rates |= {"host_bytes_per_s": self.host_bytes_per_s}
        rates |= {"exp_per_s": 1.0 if self.exp_per_s is None else self.exp_per_s}
        wrong = {name: value for name, value in rates.items() if not value > 0}
        if wrong or not self.gemm_flops:
            raise ValueError(f"machine {self.machine!r}: {wrong or 'gemm_flops is empty'}. Rates must be positive.")
        if unknown := set(self.gemm_flops) - set(DTYPES):
            raise ValueError(f"machine {self.machine!r}: gemm_flops of {sorted(unknown)}. Dtypes: {', '.join(DTYPES)}.")

    def _check_types(self) -> None:
        hints = {
            name: hint for name, hint in field_hints(type(self)).items() if kind_of(hint) in (str, int, float, bool)
        }
        for name, hint in hints.items():
            checked(f"machine {quoted(self.machine)}: {name}", hint, getattr(self, name))
        if not isinstance(self.gemm_flops, dict) or not isinstance(self.methods, dict):
            raise ValueError(f"machine {self.machine!r}: gemm_flops and methods are objects. Correct them.")
        for name, value in self.gemm_flops.items():
            checked(f"machine {quoted(self.machine)}: gemm_flops[{quoted(name)}]", float, value)
        if self.call_s < 0 or (self.memory_bytes is not None and self.memory_bytes < 1):
            raise ValueError(f"machine {self.machine!r}: call_s or memory_bytes is negative. Correct it.")
        for name, rows in self.methods.items():
            for row in rows if isinstance(rows, list) else [rows]:
                tokens = row.get("tokens") if isinstance(row, dict) else None
                if not _positive(tokens) or not (row.get("step_speedup") is None or _positive(row["step_speedup"])):
                    raise ValueError(
                        f"machine {self.machine!r}: methods[{quoted(name)}] holds {shown(row)}. Each is a list of rows "
                        "with tokens, and step_speedup or null, both positive."
                    )

    @property
    def is_cpu(self) -> bool:
        """Whether they are those of a CPU: only there exponentials have a rate of their own."""
        return self.exp_per_s is not None

    def usable_bytes(self, memory_bytes: int) -> int:
        """What is left for tensors of a memory limit."""
        return max(0, memory_bytes - RESERVE_BYTES["cpu" if self.is_cpu else "gpu"])

    def gemm(self, dtype: str) -> float:
        """FLOP/s of a matrix product; the other dtype's rate where this one was not timed."""
        return self.gemm_flops.get(dtype) or next(iter(self.gemm_flops.values()))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MachineRates:
        """Rebuild rates from JSON values; keys of a later layout are left out.

        Raises:
            ValueError: a key is missing, or a rate is not positive.
        """
        known = {name for name in cls.__dataclass_fields__}
        needed = {"machine", "gemm_flops", "copy_bytes_per_s", "attention_flops"}
        if missing := needed - set(values):
            raise ValueError(f"machine rates lack {', '.join(sorted(missing))}. `sparsetrain bench` writes them all.")
        return cls(**{key: value for key, value in values.items() if key in known})

    def save(self, path: str | Path) -> None:
        """Write the rates as JSON."""
        write_whole(path, to_json(self.to_dict(), indent=2) + "\n")


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


@cache
def known_machines() -> dict[str, MachineRates]:
    """The built-in machines by the name that `--gpu` takes."""
    text = (Path(__file__).parent / "machines.json").read_text(encoding="utf-8")
    return {name: MachineRates.from_dict(values) for name, values in json.loads(text).items()}


def machine_rates(name: str) -> MachineRates:
    """The rates of a built-in machine, or of a file that `sparsetrain bench` wrote.

    Raises:
        ValueError: neither a known name nor a readable file.
    """
    machines = known_machines()
    if name.lower() in machines:
        return machines[name.lower()]
    path = Path(name)
    if not os.path.exists(path) or not path.suffix:
        near = suggest(name.lower(), machines)
        raise ValueError(f"unknown machine {shown(name)}.{near} Known: {', '.join(machines)}; or give a measured.json.")
    try:
        return MachineRates.from_dict(read_plain_object(path, 2**22))
    except ValueError as error:
        raise ValueError(f"{quoted(str(path))} holds no machine rates: {error}") from None
