"""Masked growth beside ordinary pre-training of the same model: loss at equal FLOPs, over FLOPs and over time.

A cell `MODEL ARM SHARE SEED` is one run in a process of its own. An arm at share s trains as many steps as s times the
ordinary run's FLOPs have room for, by a schedule of that length: a loss is that of a finished run.
All sizes that an arm trains are charged: 6 · parameters without embeddings + 12 · layers · width · length, per token.
Held-out loss is taken along the way, with FLOPs, wall and CPU seconds up to there; evaluation is in neither. The
seconds of growing itself (`switch_s`) are, and what a ramp's steps cost beyond those after it is `ramp_extra_s`.

    python -m bench run masked_growth --output DIR [--cells 'gpt2 grown*'] [--minutes 60]
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.runner import Asked, Benchmark, Cell, in_own_process

SEEDS = (0, 1, 2)
HALF = "hidden/2 heads/2 ffn/2 layers/2"
SIZES: dict[str, dict[str, int]] = {
    "gpt2": {"hidden": 256, "heads": 4, "ffn": 1024, "layers": 8},
    "bert": {"hidden": 256, "heads": 4, "ffn": 1024, "layers": 8},
    "vit": {"hidden": 128, "heads": 4, "ffn": 512, "layers": 8},
}
BATCHES = {"gpt2": (16, 128), "bert": (16, 128), "vit": (64, 50)}
"""Rows of a step, and tokens of a row."""
RATES = {"gpt2": 1e-3, "bert": 1e-3, "vit": 1e-3}
HELD_OUT = 2**31
"""The seed of what is held out."""
BYTES, MASK = 257, 256
"""Words of the byte models; the last one stands for a hidden byte."""


@dataclass(frozen=True)
class Arm:
    """A way to train. plan: None trains the whole model throughout. masked: new parts begin masked, not at once.
    small: the plan's first part throughout."""

    plan: tuple[str, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    masked: bool = True
    small: bool = False


WIDTH_FIRST = (f"40% {HALF}", "20% hidden*2 heads*2 ffn*2", "40% layers*2")
DEPTH = ("50% layers/2", "50% layers*2")
ARMS = {
    "ordinary": Arm(),
    "grown": Arm(WIDTH_FIRST),
    "no mask": Arm(WIDTH_FIRST, masked=False),
    "small alone": Arm(WIDTH_FIRST, small=True),
    "stacked": Arm(DEPTH, masked=False),
    "layers": Arm(DEPTH),
    "depth first": Arm((f"40% {HALF}", "20% layers*2", "40% hidden*2 heads*2 ffn*2")),
    "rewound": Arm(WIDTH_FIRST, {"rewind": "all"}),
    "published": Arm(WIDTH_FIRST, {"faithful": True}),
    "long ramp": Arm(WIDTH_FIRST, {"ramp_ratio": 0.1}),
    "at once": Arm((f"60% {HALF}", "40% hidden*2 heads*2 ffn*2 layers*2")),
}
CONTROLS = [name for name in ARMS if name not in ("ordinary", "grown")]
MAIN_CONTROLS = ["no mask", "small alone", "stacked"]
"""Of every seed, where the others are of the first."""


def build(model: str, sizes: dict[str, int], tokens: int) -> Any:
    """The whole model with random weights."""
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        GPT2Config,
        GPT2LMHeadModel,
        ViTConfig,
        ViTForImageClassification,
    )

    hidden, heads, ffn, layers = (sizes[axis] for axis in ("hidden", "heads", "ffn", "layers"))
    if model == "gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=BYTES,
                n_positions=tokens,
                n_embd=hidden,
                n_head=heads,
                n_inner=ffn,
                n_layer=layers,
                **dropout,
            )
        )
    common = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": ffn}
    common |= {"num_hidden_layers": layers, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if model == "bert":
        return BertForMaskedLM(BertConfig(vocab_size=BYTES, max_position_embeddings=tokens, **common))
    return ViTForImageClassification(ViTConfig(image_size=28, patch_size=4, num_channels=1, num_labels=10, **common))


def flops(model: Any, tokens: int) -> float:
    """Of a training step, per token."""
    from sparsetrain.core.anatomy import describe

    anatomy = describe(model)
    weights = {name: p.numel() for name, p in model.named_parameters() if "embed" not in name and ".wpe" not in name}
    weights.pop(f"{anatomy.embedding}.weight", None)
    width = anatomy.attentions[0].num_heads * anatomy.attentions[0].head_dim
    return 6 * sum(weights.values()) + 12 * len(anatomy.blocks) * width * tokens


def batches(model: str, rows: int, tokens: int, seed: int, held_out: bool) -> Iterator[dict[str, Any]]:
    """Batches without end; those held out are the same for every seed."""
    import numpy as np
    import torch

    draw = np.random.default_rng(HELD_OUT if held_out else seed)
    side = _images()[held_out] if model == "vit" else _bytes()[held_out]
    while True:
        if model == "vit":
            places = draw.integers(0, len(side["labels"]), rows)
            pixels = torch.from_numpy(side["pixel_values"][places]).float()[:, None] / 127.5 - 1
            yield {"pixel_values": pixels, "labels": torch.from_numpy(side["labels"][places])}
            continue
        starts = draw.integers(0, len(side) - tokens, rows)
        ids = torch.from_numpy(np.stack([side[at : at + tokens] for at in starts]).astype(np.int64))
        if model == "gpt2":
            yield {"input_ids": ids, "labels": ids}
            continue
        hidden = torch.from_numpy(draw.random(ids.shape) < 0.15)
        yield {"input_ids": ids.masked_fill(hidden, MASK), "labels": ids.masked_fill(~hidden, -100)}


@functools.cache
def _bytes() -> tuple[Any, Any]:
    """Python's standard library: (training bytes, held-out bytes); every twentieth file is held out."""
    import numpy as np

    from sparsetrain.data.embedded import stdlib_documents
    from sparsetrain.hf.assets import resolve_data

    found = stdlib_documents(Path(resolve_data("python-stdlib")))
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    for place in range(found.count):
        sides[place % 20 == 0].append(found.read(place).encode())
    train, held = (np.frombuffer(b"\n".join(side), dtype=np.uint8) for side in sides)
    return train, held


@functools.cache
def _images() -> tuple[dict[str, Any], dict[str, Any]]:
    from sparsetrain.data.images import read_images
    from sparsetrain.hf.assets import resolve_data

    found = read_images(Path(resolve_data("fashion-mnist")), max_rows=None, max_eval_rows=None, seed=0)
    return found.train, found.held_out


def steps_of(parts: list[tuple[float, float]], whole: float, steps: int, share: float) -> int:
    """The steps that cost `share` of `steps` ordinary ones.

    Args:
        parts: (share of the steps, FLOPs of one) of each stage. whole: FLOPs of an ordinary step.
    """
    return round(share * steps * whole / sum(part * cost for part, cost in parts))


def rate(step: int, steps: int, warmup: int, rewound: int | None) -> float:
    """Share of the peak: up over the warm-up, down in a line to a tenth; from its peak again where it was rewound."""
    step -= max(0, rewound - warmup) if rewound is not None else 0
    return (step + 1) / warmup if step < warmup else 1 - 0.9 * (step - warmup) / max(1, steps - warmup)


def trained(model: str, name: str, share: float, seed: int, settings: dict[str, Any], threads: int) -> dict[str, Any]:
    return in_own_process(f"{__name__}:train", model, name, share, seed, settings, threads)


def train(model: str, name: str, share: float, seed: int, settings: dict[str, Any], threads: int) -> dict[str, Any]:
    """One run: its losses along the way, and what it cost."""
    import torch

    import sparsetrain
    from sparsetrain.core.anatomy import describe
    from sparsetrain.surgery.grow import growth_method, models_of_stages
    from sparsetrain.surgery.method import Stage, stage_end

    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    arm, (rows, tokens) = ARMS[name], BATCHES[model]
    whole = build(model, settings.get("sizes") or SIZES[model], tokens)
    if (keep_record := describe(whole).keep_record) is not None:
        keep_record()  # what a first growth would import is no part of it
    config = (
        None if arm.plan is None else sparsetrain.MaskedGrowth(plan=arm.plan, **{"ramp_ratio": 0.02, **arm.options})
    )
    stages: tuple[Stage, ...] = (Stage(name="training", share=1.0),)
    shapes = [whole]
    if config is not None:
        stages = growth_method(config).stages(config)
        shapes = list(models_of_stages(whole, config))
    if arm.small:
        stages, shapes = stages[:1], shapes[:1]
        stages = (Stage(name=stages[0].name, share=1.0),)
    costs = [flops(each, tokens) for each in shapes]
    parts = [(stage.share, cost) for stage, cost in zip(stages, costs, strict=True)]
    steps = steps_of(parts, flops(whole, tokens), settings["steps"], share)
    run = Run(model, settings, seed, steps, rows, tokens)
    first = 0
    for index, (stage, cost) in enumerate(zip(stages, costs, strict=True)):
        last = stage_end(stages, index, steps)
        run.enter(whole if index == 0 else None, config, index, arm.masked)
        run.rewound = first if stage.rewind_lr else run.rewound
        for step in range(first, last):
            run.step(step, cost)
        run.stage_s.append([stage.name, last - first, statistics.median(run.step_s[first:] or [0.0])])
        first = last
    return run.result()


class Run:
    """A training loop that goes on through growths."""

    def __init__(self, model: str, settings: dict[str, Any], seed: int, steps: int, rows: int, tokens: int) -> None:
        self.kind, self.settings, self.steps, self.tokens = model, settings, steps, rows * tokens
        self.warmup = max(1, steps // 20)
        self.train = batches(model, rows, tokens, seed, held_out=False)
        held = batches(model, rows, tokens, 0, held_out=True)
        self.held = [next(held) for _ in range(settings["eval_batches"])]
        self.rewound: int | None = None
        self.model: Any = None
        self.optimizer: Any = None
        self.handles: list[Any] = []
        self.flops = self.wall_s = self.cpu_s = self.switch_s = 0.0
        self.step_s: list[float] = []
        self.stage_s: list[list[Any]] = []
        self.evals: list[dict[str, float]] = []

    def enter(self, whole: Any, config: Any, index: int, masked: bool) -> None:
        """Begin a stage."""
        import torch

        import sparsetrain
        from sparsetrain.surgery.record import handles_of

        began, cpu = time.perf_counter(), time.process_time()
        if index == 0:
            self.model = whole if config is None else sparsetrain.grow(whole, config, stage=0)
            matrices = [p for p in self.model.parameters() if p.ndim > 1]
            others = [p for p in self.model.parameters() if p.ndim <= 1]
            groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
            self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
        else:
            for handle in self.handles:
                handle.step(len(self.step_s), self.steps)
            self.model = sparsetrain.grow(self.model, config, self.optimizer, stage=index)
            if not masked:
                for handle in handles_of(self.model):
                    handle.restore()
        self.handles = handles_of(self.model)
        self._spend(began, cpu)
        self.switch_s += time.perf_counter() - began if index else 0.0

    def step(self, step: int, cost: float) -> None:
        """One optimizer step, and an evaluation after every twentieth of the run."""
        import torch

        if not self.evals:
            self.evaluate(0)
        began, cpu = time.perf_counter(), time.process_time()
        for group in self.optimizer.param_groups:
            group["lr"] = RATES[self.kind] * rate(step, self.steps, self.warmup, self.rewound)
        for handle in self.handles:
            handle.step(step, self.steps)
        self.model.train()(**next(self.train)).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        for handle in self.handles:
            handle.updated()
        self.optimizer.zero_grad()
        self._spend(began, cpu)
        self.step_s.append(time.perf_counter() - began)
        self.flops += cost * self.tokens
        every = max(1, self.steps // self.settings["evals"])
        if (step + 1) % every == 0 or step + 1 == self.steps:
            self.evaluate(step + 1)

    def evaluate(self, step: int) -> None:
        import torch

        with torch.no_grad():
            loss = statistics.mean(self.model.eval()(**batch).loss.item() for batch in self.held)
        spent = {"flops": self.flops, "wall_s": self.wall_s, "cpu_s": self.cpu_s}
        self.evals.append({"step": step, "loss": loss, **spent})

    def _spend(self, began: float, cpu: float) -> None:
        self.wall_s += time.perf_counter() - began
        self.cpu_s += time.process_time() - cpu

    def result(self) -> dict[str, Any]:
        after = {name: seconds for name, _, seconds in self.stage_s}
        ramps = [entry for entry in self.stage_s if entry[0].endswith(", masked")]
        extra = sum(count * (seconds - after[name.removesuffix(", masked")]) for name, count, seconds in ramps)
        return {
            "loss": self.evals[-1]["loss"],
            "steps": self.steps,
            "flops": self.flops,
            "wall_s": self.wall_s,
            "cpu_s": self.cpu_s,
            "switch_s": self.switch_s,
            "ramp_extra_s": extra,
            "stages": self.stage_s,
            "evals": self.evals,
        }


def against(ours: dict[str, Any], ordinary: dict[str, Any]) -> dict[str, Any]:
    """What an arm's finished run cost of the ordinary one, and when in between it had the ordinary's final loss."""
    reached = next((point for point in ours["evals"] if point["loss"] <= ordinary["loss"]), None)
    trained_s = sum(count * median for _, count, median in ours["stages"])  # whatever else the machine did
    growing_s = ours["switch_s"] + max(0.0, ours["ramp_extra_s"])
    return {
        "loss_less_ordinary": ours["loss"] - ordinary["loss"],
        "of_its": {name: ours[name] / ordinary[name] for name in ("flops", "wall_s", "cpu_s")},
        "reached_at": reached and {name: reached[name] / ordinary[name] for name in ("flops", "wall_s", "cpu_s")},
        "growing_share": growing_s / (trained_s + ours["switch_s"]),
    }


def cells(asked: Asked) -> list[Cell]:
    """The ordinary runs and the grown ones, all seeds; other arms of the first seed; the main controls' other seeds."""
    shares = asked.settings["shares"]
    first, *others = asked.seeds
    found: list[Cell] = []
    for seed in asked.seeds:
        for model in ("gpt2", "bert"):
            found += _beside(model, ["grown"], shares, seed, asked, ordinary=True)
    found += _beside("vit", ["grown"], shares, first, asked, ordinary=True)
    for model in ("gpt2", "bert"):
        found += _beside(model, CONTROLS, shares[:1], first, asked, ordinary=False)
    found += _beside("vit", ["no mask", "stacked"], shares[:1], first, asked, ordinary=False)
    for seed in others:
        for model in ("gpt2", "bert"):
            found += _beside(model, MAIN_CONTROLS, shares[:1], seed, asked, ordinary=False)
    return found


def _beside(model: str, arms: list[str], shares: list[float], seed: int, asked: Asked, ordinary: bool) -> list[Cell]:
    beside = f"{model} ordinary 1 {seed}"

    def measure(name: str, share: float) -> Callable[..., Any]:
        def of(*others: dict[str, Any]) -> dict[str, Any]:
            found = trained(model, name, share, seed, asked.settings, asked.threads)
            return found | (against(found, others[0]) if others else {})

        return of

    found = [Cell(beside, measure("ordinary", 1.0))] if ordinary else []
    return found + [
        Cell(f"{model} {name} {share:g} {seed}", measure(name, share), uses=(beside,))
        for name in arms
        for share in shares
    ]


BENCHMARKS = [
    Benchmark(
        name="masked_growth",
        measures="a model that grows while it is pre-trained, beside the ordinary run, at equal FLOPs and over time",
        cells=cells,
        settings={"steps": 1000, "evals": 40, "eval_batches": 16, "shares": [0.65, 1.0], "sizes": None},
        quick={"steps": 20, "evals": 4, "eval_batches": 2},
        seeds=SEEDS,
        threads=2,
        shows=("loss", "loss_less_ordinary", "steps", "wall_s", "switch_s"),
    )
]
