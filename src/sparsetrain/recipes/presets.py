"""The recipes that come with the package, as data: presets, and the ways to train that a plan compares."""

from __future__ import annotations

from dataclasses import dataclass

from sparsetrain.core.config import MethodConfig
from sparsetrain.methods import PQAttention, RoutedFFN, TokenSelection

_SPT = (PQAttention(keep_ratio=0.25, block_q=64, block_k=16, from_depth=0.7), RoutedFFN.converted())
PRESETS: dict[str, tuple[MethodConfig, ...]] = {
    "spt": _SPT,
    "spt-paper": (PQAttention.paper(), RoutedFFN.paper()),
    "tokens": (TokenSelection(),),
    "spt+tokens": (*_SPT, TokenSelection()),
    "dense": (),
    (AUTO := "auto"): (),
}
"""Name -> methods: block-sparse attention with a fitted routed FFN; the published choices; gradient through selected
tokens, alone and on top of the first; plain LoRA; and `auto`, whose methods are chosen when a run begins."""
DEFAULT_PRESET = AUTO
STUDIED_PRESET = "spt"
"""What commands that look into methods take when none is named."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to train that a plan compares.

    label: `{train}` in it stands for what is trained, LoRA or all weights.
    methods: its configs. recomputes: with gradient checkpointing. offloads: what that keeps waits in the CPU's memory,
        which is left out where training is on the CPU. pieces: those in which FFNs run.
    four_bit: frozen weights in 4 bits. optim: the optimizer, where it is not AdamW in full. lora_dtype: that of LoRA's
        factors, where it is not fp32.
    untimed: what of its time is not known, and not in the step that is planned.
    rounds: why it is not exact beyond its methods, if it is not; left out on a CPU.
    all_weights: instead of LoRA, shown beside it; not picked, and left out where all weights are trained anyway.
    """

    label: str
    methods: tuple[MethodConfig, ...] = ()
    recomputes: bool = False
    offloads: bool = False
    pieces: int = 1
    four_bit: bool = False
    optim: str = ""
    lora_dtype: str = ""
    untimed: str = ""
    rounds: str = ""
    all_weights: bool = False


PIECES = 8
"""Pieces of a row in which a plan's tiled FFNs run: their wide activations are then an eighth."""
SAFEST: tuple[Way, ...] = (
    Way(label="{train}"),
    Way(label="{train} + tiled MLP", pieces=PIECES),
    Way(label="{train} + checkpointing", recomputes=True),
    Way(label="{train} + checkpointing + tiled MLP", recomputes=True, pieces=PIECES),
    Way(label="{train} + checkpointing + offload", recomputes=True, offloads=True),
    Way(label="{train} + checkpointing + offload + tiled MLP", recomputes=True, offloads=True, pieces=PIECES),
    Way(label="all weights", all_weights=True),
    Way(label="token_selection", methods=(TokenSelection(),)),
    Way(label="token_selection + checkpointing", methods=(TokenSelection(),), recomputes=True),
)
"""What a plan compares first, the safest first: the exact tools before any method. The loss of a language model is in
chunks in all of them. The other methods of the registry follow, each alone."""
_FOUR_BIT = "4-bit weights: the model that is trained on is a rounded one; not measured here"
_EIGHT_BIT = "8-bit AdamW: moments rounded to a byte; not measured here"
_FACTORS = "LoRA's factors in bf16: a step smaller than half a rounding of a weight is lost; not measured here"
_UPDATE = "the time of its update is not known here, and that of AdamW in full is planned"
_PAGES = f"{_UPDATE}; the state moves over the bus where the GPU's memory is short"
ROUNDED: tuple[Way, ...] = (
    Way(label="LoRA + bf16 factors + checkpointing", recomputes=True, lora_dtype="bf16", rounds=_FACTORS),
    Way(label="LoRA + 4-bit + checkpointing", recomputes=True, four_bit=True, rounds=_FOUR_BIT),
    Way(
        label="LoRA + 4-bit + checkpointing + offload + tiled MLP",
        recomputes=True,
        offloads=True,
        pieces=PIECES,
        four_bit=True,
        rounds=_FOUR_BIT,
    ),
    Way(label="all weights + checkpointing + paged AdamW", recomputes=True, optim="paged_adamw", untimed=_PAGES),
    Way(
        label="all weights + checkpointing + 8-bit AdamW",
        recomputes=True,
        optim="adamw_8bit",
        untimed=_UPDATE,
        rounds=_EIGHT_BIT,
    ),
    Way(
        label="all weights + checkpointing + paged 8-bit AdamW",
        recomputes=True,
        optim="paged_adamw_8bit",
        untimed=_PAGES,
        rounds=_EIGHT_BIT,
    ),
)
"""What a plan for a GPU compares too, behind what is exact on any machine: of LoRA or of all weights, whichever is
trained; the labels say of which."""
TOGETHER: tuple[Way, ...] = (
    Way(label="spt", methods=_SPT),
    Way(label="token_selection + spt", methods=(TokenSelection(), *_SPT)),
)
"""What a plan compares last: several methods at once."""
