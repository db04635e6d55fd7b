"""What 2:4 emulation costs on a CPU: a training step of an FFN with 2:4 weights against the same dense step.

A step is forward, backward, clipping and fused AdamW. The 2:4 side adds all that the method does: the mask search every
40 steps, packing once a step, MVUE on the output gradient, masked decay. Both run in one loop whose order flips each
round; the cost is the median of the per-round ratios. The search is timed apart, and its 40th part is added to every
step. Emulation computes no faster than dense: a cost below 1.3 is the aim. Gradients are compared with the reference
first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparsetrain
from bench.runner import Asked, Benchmark, Cell
from sparsetrain import SemiStructured
from sparsetrain.core.anatomy import Anatomy, Block, FFNSite
from sparsetrain.ops.sparse24_linear.reference import reference_linear

# name: d, f
SHAPES = {"gpt-256": (256, 1024), "gpt-512": (512, 2048), "gpt-768": (768, 3072)}
PRESETS = {
    "fst, dense dW": SemiStructured(),
    "fst": SemiStructured.fst(),
    "s-ste": SemiStructured.s_ste(),
    "sr-ste": SemiStructured.sr_ste(),
}
AIM = 1.3


class FFN(nn.Module):
    def __init__(self, d: int, f: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, f), nn.Linear(f, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def anatomy(self) -> Anatomy:
        f, d = self.up.weight.shape
        site = FFNSite(name="", layer=0, hidden_size=d, ffn_size=f, activation="gelu", up="up", down="down")
        return Anatomy(family="ffn", model_class="FFN", blocks=(Block(name="", layer=0, attention=None, ffn=site),))


class Training:
    """An FFN with its optimizer, and one step of it."""

    def __init__(self, shape: str, config: SemiStructured | None) -> None:
        torch.manual_seed(0)
        self.model = FFN(*SHAPES[shape])
        self.handle = None if config is None else sparsetrain.sparsify(self.model, config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.model.train()
        self.done = 0

    def step(self, x: Tensor, dy: Tensor) -> None:
        self.done += 1
        if self.handle is not None:
            self.handle.step(self.done, 10**9)  # 10⁹ steps: far from the dense tail
        self.optimizer.zero_grad()
        self.model(x).backward(dy)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if self.handle is not None:
            self.handle.adjust_gradients()
        self.optimizer.step()


def gradient_error(shape: str, config: SemiStructured, x: Tensor, dy: Tensor) -> float:
    """Largest relative L2 distance of the gradients from the straight-through definition; dW without the draw."""
    side = Training(shape, SemiStructured.from_dict({**config.to_dict(), "wgrad": "dense"}))
    model: Any = side.model
    model(x).backward(dy)
    found = [p.grad for p in model.parameters()]
    copies = [p.detach().clone().requires_grad_() for p in model.parameters()]
    up, up_bias, down, down_bias = copies
    hidden = F.gelu(reference_linear(x, up, model.up.pruned(), up_bias))
    reference_linear(hidden, down, model.down.pruned(), down_bias).backward(dy)
    return max(float((a - b.grad).norm() / b.grad.norm()) for a, b in zip(found, copies))  # type: ignore[union-attr, operator]


def timed(run: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return (clock() - start) * 1e3


def search_ms(side: Training, clock: Callable[[], float]) -> float:
    """The mask search of both linears, a `refresh_every`-th part of it."""
    model: Any = side.model
    linears = (model.up, model.down)
    times = [timed(lambda: [linear.refresh(first=False) for linear in linears], clock) for _ in range(5)]
    return statistics.median(times) / side.handle.configs[0].refresh_every  # type: ignore[union-attr]


def measure(shape: str, preset: str, tokens: int, rounds: int, one_thread: bool) -> dict[str, Any]:
    config = PRESETS[preset]
    torch.manual_seed(1)
    d, f = SHAPES[shape]
    xs, dy = [torch.randn(tokens, d) for _ in range(3)], torch.randn(tokens, d)
    error = gradient_error(shape, config, xs[0], dy)
    clock = time.process_time if one_thread else time.perf_counter
    sides = {"baseline": Training(shape, None), "candidate": Training(shape, config)}
    search = 0.0 if config.refresh_every == 1 else search_ms(sides["candidate"], clock)
    times: dict[str, list[float]] = {"baseline": [], "candidate": []}
    for index in range(min(rounds, 37) + 2):  # the search at step 40 is counted apart
        for name, side in list(sides.items())[:: 1 if index % 2 else -1]:
            times[name].append(timed(lambda side=side, x=xs[index % 3]: side.step(x, dy), clock))
    base, candidate = times["baseline"][2:], [ms + search for ms in times["candidate"][2:]]  # two rounds warm up
    low, cost, high = statistics.quantiles([b / a for a, b in zip(base, candidate)], n=4)
    return {
        "case_id": "D-cpu", "op": "sparse24_linear", "backend": "emulate", "dtype": "float32", "seed": 0,
        "shape": {"name": shape, "tokens": tokens, "d": d, "f": f}, "config": config.to_dict(), "preset": preset,
        "keep_ratio_executed": 1.0, "baseline": "dense FFN, clipping and fused AdamW",
        "baseline_ms": base, "candidate_ms": candidate, "selection_ms": search,
        "cost_q1": low, "cost_median": cost, "cost_q3": high,
        "ratio_q1": 1 / high, "ratio_median": 1 / cost, "ratio_q3": 1 / low, "aim": AIM, "aim_met": cost <= AIM,
        "checks": {"oracle": "reference", "rel_l2": error, "tolerance": 1e-5, "passed": error < 1e-5},
        "verdict": "refused" if error >= 1e-5 else "loss" if low > 1 else "win" if high < 1 else "tie",
    }  # fmt: skip


def cells(asked: Asked) -> list[Cell]:
    known = [("gpt-256", 1024, 35), ("gpt-512", 1024, 15), ("gpt-768", 2048, 9)]  # shape, tokens, rounds

    def cell(shape: str, preset: str, tokens: int, rounds: int) -> Cell:
        one_thread = asked.threads == 1
        return Cell(f"{shape} {preset}", lambda: measure(shape, preset, tokens, rounds, one_thread))

    few = known[:1] if asked.settings["few"] else known
    return [cell(shape, preset, tokens, rounds) for shape, tokens, rounds in few for preset in PRESETS]


BENCHMARKS = [
    Benchmark(
        name="sparse24",
        measures="a training step of an FFN with emulated 2:4 weights, against the dense step",
        cells=cells,
        settings={"few": False},
        quick={"few": True},
        threads=1,
        key_of=lambda row: f"{row['shape']['name']} {row['preset']}",
        shows=("cost_median", "cost_q1", "cost_q3", "selection_ms", "verdict"),
    )
]
