"""2:4 products on a GPU, shape by shape: case D of the benchmark protocol, and whether they pay there.

Forward and input gradient of each weight of an FFN, against cuBLAS on the same weight, with cuSPARSELt's algorithm
search or CUTLASS; packing and the mask search apart; and the whole FFN forward and backward with the packing that a
step of one micro-batch pays, against the dense FFN. A shape is a go where the FFN's two sparse products gain 1.15x,
packing included, and the whole FFN does not lose. What differs from the dense products is not timed. `--device cpu
--quick` tries the code by emulation, which gains nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.runner import Asked, Benchmark, Cell
from sparsetrain.ops.nm_mask import transposable_mask
from sparsetrain.ops.sparse24_linear import Packed, pack, sparse24_linear
from sparsetrain.ops.sparse24_linear.cases import TOLERANCE
from sparsetrain.ops.sparse24_linear.gain import WORTH, interleaved, search_algorithm
from sparsetrain.ops.sparse24_linear.packing import kernel_refusal, multiply_backward, multiply_forward

KERNELS = ("cusparselt", "cutlass")


class Weight:
    """A weight [out, in] that is 2:4 along both dimensions, its packing, and the activations of both products."""

    def __init__(self, out_features: int, in_features: int, tokens: int, backend: str, device: torch.device) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        draw = torch.Generator(device).manual_seed(0)
        random = functools.partial(torch.randn, generator=draw, device=device, dtype=dtype)
        self.w_oi = random(out_features, in_features) * in_features**-0.5
        self.mask = transposable_mask(self.w_oi)
        self.w_oi *= self.mask
        self.x_ti, self.dy_to = random(tokens, in_features), random(tokens, out_features)
        self.backend = backend
        self.algorithm = search_algorithm(self.w_oi, self.x_ti) if backend == "cusparselt" else 0

    def pack(self) -> Packed:
        return pack(self.w_oi, transposable=True, algorithm=self.algorithm, backend=self.backend)

    def error(self) -> float:
        """Of both products against the dense ones of the same weight."""
        packed = self.pack()
        found = (
            multiply_forward(self.x_ti, packed, packed.forward, None),
            multiply_backward(self.dy_to, packed, packed.backward),
        )
        wanted = F.linear(self.x_ti, self.w_oi), self.dy_to @ self.w_oi
        return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, wanted, strict=True))

    def times(self, rounds: int, device: torch.device) -> dict[str, Any]:
        packed = self.pack()
        forward = lambda: multiply_forward(self.x_ti, packed, packed.forward, None)  # noqa: E731
        back = lambda: multiply_backward(self.dy_to, packed, packed.backward)  # noqa: E731
        names = ("dense_ms", "sparse_ms", "ratio")
        few = max(3, rounds // 5)
        return {
            "algorithm": self.algorithm,
            "forward": dict(zip(names, interleaved(lambda: F.linear(self.x_ti, self.w_oi), forward, rounds, device))),
            "dx": dict(zip(names, interleaved(lambda: self.dy_to @ self.w_oi, back, rounds, device))),
            "pack_ms": interleaved(self.pack, self.pack, few, device)[0],
            "search_ms": interleaved(*[lambda: transposable_mask(self.w_oi)] * 2, few, device)[0],
        }


def ffn_step(up: Weight, down: Weight, sparse: bool) -> Callable[[], None]:
    """Forward and backward of down(gelu(up(x))), every weight gradient dense; 2:4 weights are packed anew."""
    x = up.x_ti.detach().requires_grad_()
    masters = [each.w_oi.detach().clone().requires_grad_() for each in (up, down)]

    def through(x: Tensor, weight: Tensor, each: Weight) -> Tensor:
        return sparse24_linear(x, weight, each.pack()) if sparse else F.linear(x, weight)

    def step() -> None:
        hidden = F.gelu(through(x, masters[0], up))
        torch.autograd.grad(through(hidden, masters[1], down), [x, *masters], down.dy_to)

    return step


def measure(d: int, f: int, tokens: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """One shape: d wide, f inside, so many tokens a forward."""
    shape = {"d": d, "f": f, "tokens": tokens}
    row: dict[str, Any] = {"op": "sparse24_linear", "case_id": "D", "shape": shape, "worth": WORTH}
    refusals = {name: kernel_refusal(name, (f, d), torch.bfloat16, device) for name in KERNELS}
    able = [name for name, reason in refusals.items() if reason is None] or (
        [] if device.type == "cuda" else ["emulate"]
    )
    if not able:
        return row | {"verdict": "refused", "why": refusals}
    row |= {"backend": able[0], "dtype": "bfloat16" if device.type == "cuda" else "float32"}
    up, down = Weight(f, d, tokens, able[0], device), Weight(d, f, tokens, able[0], device)
    error, bound = max(up.error(), down.error()), TOLERANCE["kernel"]
    row["checks"] = {"oracle": "dense products", "rel_l2": error, "tolerance": bound, "passed": error < bound}
    if not error < bound:
        return row | {"verdict": "refused"}
    row |= {"up": up.times(rounds, device), "down": down.times(rounds, device)}
    products = [row[name][of] for name in ("up", "down") for of in ("forward", "dx")]
    packing = row["up"]["pack_ms"] + row["down"]["pack_ms"]
    ours = sum(each["sparse_ms"] for each in products) + packing
    row["two_products"] = sum(each["dense_ms"] for each in products) / ours
    dense_ms, sparse_ms, ratio = interleaved(ffn_step(up, down, False), ffn_step(up, down, True), rounds, device)
    row |= {"ffn_dense_ms": dense_ms, "ffn_sparse_ms": sparse_ms, "ratio_median": ratio}
    return row | {"verdict": "go" if row["two_products"] >= WORTH and ratio >= 1 else "no-go"}


def cells(asked: Asked) -> list[Cell]:
    device = torch.device("cuda" if torch.cuda.is_available() else asked.device)
    return [
        Cell(f"d={d} f={f} M={tokens}", functools.partial(measure, d, f, tokens, asked.settings["rounds"], device))
        for tokens in asked.settings["tokens"]
        for d, f in asked.settings["shapes"]
    ]


BENCHMARKS = [
    Benchmark(
        name="sparse24_gpu",
        measures="2:4 products and a whole FFN with them against cuBLAS on a GPU: go or no-go, shape by shape",
        cells=cells,
        settings={"tokens": [8192, 32768, 65536, 16384], "shapes": [[4096, 14336], [1024, 4096]], "rounds": 30},
        quick={"tokens": [64], "shapes": [[32, 64]], "rounds": 3},
        dtype="bfloat16; float32 on a CPU",
        under="cells",
        shows=("two_products", "ratio_median", "verdict"),
        needs_gpu=True,
    )
]
