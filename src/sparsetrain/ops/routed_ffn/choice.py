"""Who computes a routed FFN: what can run, and on a GPU which is faster, timed once a shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsetrain.core.fastest import Timings, Ways, may_time, ranked, timings_here
from sparsetrain.ops.routed_ffn import grouped
from sparsetrain.ops.routed_ffn.problem import Problem
from sparsetrain.ops.routed_ffn.torch import grouped_ffn

TIMED: dict[str, Any] = {"grouped_mm": grouped.device_ffn, "torch": grouped_ffn}


def on_device(place: torch.device, work: torch.dtype) -> dict[str, str | None]:
    """Backends of an ordinary call there, best first, untimed; and why one cannot."""
    return _by_rule(place, grouped.unable_on(place, work))


def best_first(p: Problem, *, timed: bool) -> dict[str, str | None]:
    """Backends as `choose` takes them: on a GPU, if `timed`, the faster one first, and none that broke."""
    found = _by_rule(p.x_td.device, grouped.unable(p))
    alone = found["grouped_mm"] is not None or p.choice_tk is None or not len(p.x_td)
    return found if alone or not timed or not may_time(p.x_td) else ranked(found, timings(p))


def _by_rule(place: torch.device, reason: str | None) -> dict[str, str | None]:
    """On a CPU grouped products are as fast as tiles and keep more for the backward pass: they run if asked for."""
    if place.type == "cuda":
        return {"grouped_mm": reason, "torch": None, "reference": None}
    return {"torch": None, "grouped_mm": reason, "reference": None}


def timings(p: Problem) -> Timings:
    """Forward and backward of both on random tokens and choices, as many as p has, rounded up to a power of two.

    Whether p wants gradients does not count, for a checkpointed forward and its recomputation decide alike: weights are
    taken to be trained where there is no LoRA.
    """
    assert p.choice_tk is not None
    tokens = 1 << (len(p.x_td) - 1).bit_length()
    ranks = [b.shape[1] for b in (*p.lora_b, p.lora_b_dr) if b is not None]
    key = (
        f"{tokens:,} tokens of {p.x_td.shape[1]}, {p.choice_tk.shape[1]} of {p.num_blocks} blocks of {p.width}, "
        f"{p.num_shared} units always on, {'gated' if len(p.weights) == 2 else 'not gated'} {p.activation}, "
        f"LoRA of {ranks}, {'' if p.gate_tk is None else 'with c, '}{str(p.x_td.dtype).removeprefix('torch.')}"
    )
    return timings_here("routed_ffn", key, p.x_td.device, lambda: _ways(p, tokens, trained=not ranks))


def _ways(p: Problem, tokens: int, trained: bool) -> Ways:
    draw = torch.Generator(p.x_td.device).manual_seed(0)

    def drawn(x: Tensor | None) -> Tensor | None:
        """Of so many tokens as x is of its own."""
        if x is None:
            return None
        found = torch.rand(tokens, x.shape[1], generator=draw, device=x.device)
        return found < 0.5 if x.dtype == torch.bool else (found * 2 - 1).to(x.dtype).requires_grad_()

    def held(x: Any, train: bool) -> Any:
        if isinstance(x, tuple):
            return tuple(held(each, train) for each in x)
        return None if x is None else x.detach().requires_grad_(train)

    x_td, choice = drawn(p.x_td), torch.rand(tokens, p.num_blocks, generator=draw, device=p.x_td.device)
    assert x_td is not None and p.choice_tk is not None
    given = p._replace(
        x_td=x_td,
        weights=held(p.weights, trained),
        biases=held(p.biases, trained),
        lora_b=held(p.lora_b, True),
        low_tr=drawn(p.low_tr),
        down_df=held(p.down_df, trained),
        lora_a_rf=held(p.lora_a_rf, True),
        lora_b_dr=held(p.lora_b_dr, True),
        keep_tf=drawn(p.keep_tf),
        start_d=held(p.start_d, trained),
        shift_gd=held(p.shift_gd, True),
        choice_tk=choice.argsort(1)[:, : p.choice_tk.shape[1]].to(p.choice_tk.dtype),
        gate_tk=drawn(p.gate_tk),
        valid_t=None,
        dense_t=None,
    )
    parts = [part for field in given for part in (field if isinstance(field, tuple) else (field,))]
    leaves = [part for part in parts if isinstance(part, Tensor) and part.requires_grad]
    dy = torch.ones_like(x_td)

    def step(run: Callable[[Problem], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(run(given), leaves, dy, allow_unused=True)

    return {name: step(run) for name, run in TIMED.items()}
