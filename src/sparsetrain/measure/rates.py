"""What this machine reaches: matrix products by number format, copies, attention. Timed, since a query is no proof:
a format can be supported and slow (bf16 products on a CPU without units for it run at a quarter of fp32's rate).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from sparsetrain.core.formats import Formats, recall_formats, remember_formats
from sparsetrain.measure.machine import describe_machine

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What is trained in; fp16 overflows, and no CPU is fast in it."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The layout that `sparsetrain plan --gpu measured.json` reads.

    gemm_flops: FLOP/s of a large product, by format. copy_bytes_per_s: read and written. attention_flops: forward and
    backward of causal SDPA, visible pairs counted once. exp_per_s: exponentials, None on a GPU, where bytes bound them.
    call_s: what a tiny operation costs.
    methods: method -> timed shapes, with `speedup` of the part that the method replaces.
    """

    machine: str
    gemm_flops: dict[str, float]
    copy_bytes_per_s: float
    attention_flops: float
    exp_per_s: float | None
    call_s: float
    memory_bytes: int | None
    methods: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    source: str = "sparsetrain bench"
    measured: bool = True

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_rates(device: torch.device | str, *, seconds: float = 0.5) -> Rates:
    """Time the machine: about `seconds` for each of six rates, seven on a CPU."""
    device = torch.device(device)
    machine = describe_machine()
    gpu = machine.gpus[device.index or 0] if device.type == "cuda" else None
    return Rates(
        machine=gpu["name"] if gpu else f"{machine.cpu}, {machine.threads} threads",
        gemm_flops={name: gemm_flops(device, kind, seconds=seconds) for name, kind in FORMATS.items()},
        copy_bytes_per_s=copy_bytes_per_s(device, seconds=seconds),
        attention_flops=attention_flops(device, seconds=seconds),
        exp_per_s=None if gpu else exp_per_s(device, seconds=seconds),
        call_s=call_s(device),
        memory_bytes=gpu["memory_bytes"] if gpu else machine.memory_bytes,
    )


def formats_of(asked: str, folder: Path | None, *, anew: bool = False) -> Formats:
    """The formats of a device, as remembered since the machine started or timed now, in some 0.2 s.

    Args:
        asked: cpu, mps, cuda, cuda:N, or auto: a GPU if there is one.
        folder: where it is remembered; None: nowhere.
        anew: time them, whatever is remembered.
    """
    if folder is not None and not anew and (known := recall_formats(folder, asked)) is not None:
        return known
    device, threads = device_of(asked), torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)  # where others compute too, threads wait for each other, and not for the products
    try:
        rates = _gemm_rates(device)
    finally:
        torch.set_num_threads(threads)
    found = Formats(device=device.type, gemm_flops=rates, threads=threads)
    if folder is not None:
        remember_formats(folder, asked, found)
    return found


def device_of(asked: str) -> torch.device:
    """The device that a name stands for; auto takes a GPU if there is one."""
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(asked)


def _gemm_rates(device: torch.device) -> dict[str, float]:
    """Format -> FLOP/s, of products small enough that a slow format is timed in little time too; in turns, so that
    both meet the same state of a busy machine."""
    size = 4096 if device.type == "cuda" else 512
    rates: dict[str, float] = {}
    kinds = FORMATS if device.type != "mps" else {"fp32": torch.float32}  # bf16 has not been tried on an Apple GPU
    for _ in range(3):
        for name, kind in kinds.items():
            try:
                found = gemm_flops(device, kind, seconds=0.02, size=size)
            except RuntimeError:  # the device has no product in that format
                continue
            rates[name] = max(found, rates.get(name, 0.0))
    return rates


def gemm_flops(
    device: torch.device | str, dtype: torch.dtype, *, seconds: float = 0.5, size: int | None = None
) -> float:
    """FLOP/s of a square product of random numbers: by default 1,024 wide on a CPU, 8,192 on a GPU.

    Raises:
        RuntimeError: the device has no product in that format.
    """
    size = size or (8192 if torch.device(device).type == "cuda" else 1024)
    a_mk = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / best_seconds(lambda: a_mk @ a_mk, device, seconds)


def copy_bytes_per_s(device: torch.device | str, *, seconds: float = 0.5) -> float:
    """Bytes read and written per second: 256 MiB, more than any cache."""
    source = torch.randn(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device, seconds)


def attention_flops(device: torch.device | str, *, tokens: int | None = None, seconds: float = 0.5) -> float:
    """FLOP/s of causal SDPA, forward and backward: 14·pairs·D a head, 8 heads of width 64."""
    gpu = torch.device(device).type == "cuda"
    tokens = tokens or (8192 if gpu else 1024)
    heads, width = 8, 64
    dtype = torch.bfloat16 if gpu else torch.float32
    q, k, v = (torch.randn(1, heads, tokens, width, device=device).to(dtype).requires_grad_() for _ in range(3))
    grad = torch.randn_like(q)

    def both() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(grad)

    pairs = tokens * (tokens + 1) / 2
    return 14 * pairs * width * heads / best_seconds(both, device, seconds)


def exp_per_s(device: torch.device | str, *, seconds: float = 0.5) -> float:
    """Exponentials per second, of 64 Ki numbers that stay in a cache."""
    x = torch.randn(2**16, device=device)
    out = torch.empty_like(x)
    return x.numel() / best_seconds(lambda: torch.exp(x, out=out), device, seconds)


def call_s(device: torch.device | str) -> float:
    """Seconds of an addition to one number: the cost of calling an operation."""
    x = torch.zeros(1, device=device)

    def thousand() -> None:
        for _ in range(1000):
            x.add_(1)

    return best_seconds(thousand, device, 0.1) / 1000


def best_seconds(call: Callable[[], object], device: torch.device | str, seconds: float) -> float:
    """The shortest of as many calls as fit in `seconds`, after one to warm up (two at least)."""
    device = torch.device(device)

    def timed() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed()
    begin, best = time.perf_counter(), timed()
    while time.perf_counter() - begin < seconds:
        best = min(best, timed())
    return best
