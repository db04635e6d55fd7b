"""Does it pay here? Times forward and backward of one linear, dense and as Monarch, on the device, once a machine."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.core.fastest import in_turns
from sparsetrain.core.remembered import cache_folder, name_here, recall, remember
from sparsetrain.ops.monarch_linear import monarch_linear

WIDTHS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
"""Widths at which `break_even` looks."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What was measured: medians in ms, and the median of dense / Monarch over rounds in which both ran."""

    in_features: int
    out_features: int
    num_blocks: int
    tokens: int
    dtype: str
    device: str
    dense_ms: float
    monarch_ms: float
    ratio: float

    @property
    def pays(self) -> bool:
        return self.ratio > 1

    def __str__(self) -> str:
        return (
            f"{self.in_features} -> {self.out_features}, {self.num_blocks} blocks, {self.tokens} tokens, {self.dtype}: "
            f"forward + backward {self.ratio:.2f}x ({self.dense_ms:.2f} -> {self.monarch_ms:.2f} ms)"
        )


def gain_here(
    right: tuple[int, ...], left: tuple[int, ...] | None, tokens: int, dtype: torch.dtype, device: torch.device | str
) -> Gain:
    """The gain of factors of these shapes on this machine: as it was remembered since it started, or timed now.

    Args:
        right, left: shapes of R and L. tokens: rows of one call.
    """
    return _gain_here(tuple(right), None if left is None else tuple(left), tokens, dtype, str(device))


@functools.cache
def _gain_here(
    right: tuple[int, ...], left: tuple[int, ...] | None, tokens: int, dtype: torch.dtype, device: str
) -> Gain:
    asked = (right, left, tokens, str(dtype), device, _gpu(device))
    place = cache_folder() / "machine" / name_here("monarch", *asked)
    if (text := recall(place)) is not None:
        return Gain(**json.loads(text))
    found = measure_gain(right, left, tokens, dtype, device)
    remember(place, json.dumps(asdict(found)))
    return found


def _gpu(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else ""


def break_even(
    num_blocks: int, tokens: int, dtype: torch.dtype, device: torch.device | str, gain: Callable[..., Gain] = gain_here
) -> int | None:
    """The smallest width of `WIDTHS` at which a square linear pays; None if none does."""
    for width in WIDTHS:
        block = width // num_blocks
        if width % num_blocks**2 == 0:
            shape = (num_blocks, block, block)
            if gain(shape, shape, tokens, dtype, device).pays:
                return width
    return None


def measure_gain(
    right: tuple[int, ...], left: tuple[int, ...] | None, tokens: int, dtype: torch.dtype, device: torch.device | str
) -> Gain:
    """Time both sides in turns, the order flipped each round.

    On a CPU it is the CPU's time of one thread: where others work too, threads wait for each other, at small products
    most of all. With a load of 11 on two cores a 128 wide linear read 0.14x by the clock of two threads, and 0.67x so.
    """
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if torch.device(device).type == "cpu" else threads)
        return _measured(right, left, tokens, dtype, device)
    finally:
        torch.set_num_threads(threads)


def _measured(
    right: tuple[int, ...], left: tuple[int, ...] | None, tokens: int, dtype: torch.dtype, device: torch.device | str
) -> Gain:
    k, q, p = right
    inputs, outputs = k * p, k * q if left is None else left[0] * left[1]
    draw = torch.Generator(device).manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=device, dtype=dtype).requires_grad_()

    x, dy = leaf(tokens, inputs), leaf(tokens, outputs).detach()
    weight, bias, factor, second = (
        leaf(outputs, inputs),
        leaf(outputs),
        leaf(*right),
        None if left is None else leaf(*left),
    )
    sides: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: F.linear(x, weight, bias),
        "monarch": lambda: monarch_linear(x, factor, second, bias),
    }
    leaves = [tensor for tensor in (x, weight, bias, factor, second) if tensor is not None]

    def step(run: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(run(), leaves, dy, allow_unused=True)

    times = in_turns({name: step(run) for name, run in sides.items()}, torch.device(device))
    dense, ours = times["dense"], times["monarch"]
    return Gain(
        in_features=inputs, out_features=outputs, num_blocks=k, tokens=tokens, dtype=str(dtype).removeprefix("torch."),
        device=str(device), dense_ms=statistics.median(dense), monarch_ms=statistics.median(ours),
        ratio=statistics.median(a / b for a, b in zip(dense, ours)),
    )  # fmt: skip
