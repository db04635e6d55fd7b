"""Shapes and tolerances of the routed FFN, read by the tests and the benchmark."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call: `shared` always-on hidden units, then `blocks` of `width`, of which a token uses `active`."""

    name: str
    ffn: str = "tiny"
    tokens: int = 37
    hidden: int = 5
    width: int
    blocks: int = 4
    active: int = 2
    shared: int = 2
    gated: bool = True
    lora: bool = True
    bias: bool = True
    shift: bool = False

    @property
    def ffn_size(self) -> int:
        return self.shared + self.blocks * self.width

    @property
    def keep_ratio(self) -> float:
        """Share of the hidden units that a token uses."""
        return (self.shared + self.active * self.width) / self.ffn_size


TINY = (
    Case(name="narrow", width=3),  # narrow blocks share tiles and copy their weights
    Case(name="wide", width=70),  # wide ones do not
)

FFNS = {"gelu-768": (768, 3072, False), "swiglu-2048": (2048, 5504, True), "smollm2": (576, 1536, True)}
"""Name -> d, f, gated."""


def _real(ffn: str, tokens: int, blocks: int, keep_ratio: float, shared_ratio: float = 0.0) -> Case:
    """The case whose share of hidden units is nearest to `keep_ratio`."""
    hidden, f, gated = FFNS[ffn]
    width = int(f * (1 - shared_ratio)) // blocks
    shared = f - width * blocks
    return Case(
        name=f"{ffn}_t{tokens}_g{blocks}_keep{keep_ratio}_shared{shared_ratio}",
        ffn=ffn,
        tokens=tokens,
        hidden=hidden,
        width=width,
        blocks=blocks,
        active=min(blocks, max(1, round((keep_ratio * f - shared) / width))),
        shared=shared,
        gated=gated,
        bias=not gated,
    )


QUICK = (_real("smollm2", 1024, 8, 0.5, 0.25), _real("gelu-768", 1024, 8, 0.5))

REAL = (
    *(_real(ffn, n, 8, keep) for ffn in ("gelu-768", "swiglu-2048") for n in (1024, 4096) for keep in (0.5, 0.25)),
    *(_real("smollm2", n, g, keep) for n in (1024, 4096) for g in (4, 8, 16, 32) for keep in (0.5, 0.25)),
    *(_real("smollm2", n, g, 0.5, 0.25) for n in (1024, 2048, 4096) for g in (4, 8, 16, 32, 64)),
)

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
"""Largest |difference| by element in fp64, relative L2 distance in fp32, of outputs and gradients."""
