"""A training step on selected tokens against the same step on all of them: time and memory, SmolLM2 with LoRA.

Baseline and candidate run in one loop whose order flips each round. The baseline's head is chunked too, over all rows.
Selection, gathering, LoRA and the optimizer are inside the timed region. Peaks are of a fresh process each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.runner import Asked, Benchmark, Cell, in_own_process
from sparsetrain import TokenSelection, sparsify
from sparsetrain.measure.memory import peak_memory, saved_activations
from sparsetrain.measure.timing import compare

PARTS = ("linear", "step", "checkpointing", "step, policy loss", "head")
TARGETS: dict[str, Callable[[float], float | None]] = {
    "linear": lambda r: 0.9 * 2 / (1 + r),
    "step": lambda r: 1.3 if r == 0.3 else 1.0,
    "step, policy loss": lambda r: 1.0,
    "checkpointing": lambda r: 1.7 if r == 0.3 else 1.0,
    "head": lambda r: 0.95 / r,
}
CELLS = ("lora", "lora+chunked head", "tokens", "lora+checkpointing", "tokens+checkpointing")


class Trainee:
    """SmolLM2-135M with LoRA r=16 on all linears, converted once; how much is selected changes from call to call."""

    def __init__(self, tokens: int, layers: int | None) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        from sparsetrain.hf.assets import resolve_model

        model: Any = AutoModelForCausalLM.from_pretrained(
            resolve_model("smollm2-135m"), dtype=torch.float32, attn_implementation="sdpa"
        )
        if layers is not None:
            model.model.layers = model.model.layers[:layers]
            model.config.num_hidden_layers = layers
        model.config.use_cache = False
        self.handle = sparsify(model, TokenSelection())
        self.selector: Any = next(iter(self.handle.sites("token_selection").values())).selector
        self.base = model
        self.model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=generator)
        self.batch = {"input_ids": ids, "labels": ids}

    def loss(self, ratio: float, plain_head: bool = False, policy: str = "random") -> Tensor:
        self.selector.config = replace(self.selector.config, keep_ratio=ratio, policy=policy)
        if plain_head:
            logits = self.model(input_ids=self.batch["input_ids"]).logits
            return self.base.loss_function(logits, self.batch["labels"], self.base.config.vocab_size)
        return self.model(**self.batch).loss

    def step(self, ratio: float, checkpointing: bool = False, plain_head: bool = False, policy: str = "random") -> None:
        self.recompute(checkpointing)
        self.loss(ratio, plain_head, policy).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.selector.step += 1

    def recompute(self, on: bool) -> None:
        if on == any(getattr(m, "gradient_checkpointing", False) for m in self.base.modules()):
            return
        name = "activation_checkpointing" if hasattr(self.base, "activation_checkpointing_enable") else None
        name = name or "gradient_checkpointing"
        if on:
            getattr(self.base, f"{name}_enable")({"use_reentrant": False})
        else:
            getattr(self.base, f"{name}_disable")()


class LinearsOfABlock(nn.Module):
    """The seven linears of SmolLM2's block with LoRA r=16, in the operations of PEFT, and nothing between them."""

    def __init__(self, d: int = 576, kv: int = 192, f: int = 1536, rank: int = 16) -> None:
        super().__init__()
        shapes = {"q": (d, d), "k": (d, kv), "v": (d, kv), "o": (d, d), "gate": (d, f), "up": (d, f), "down": (f, d)}
        self.base = nn.ModuleDict(
            {n: nn.Linear(i, o, bias=False).requires_grad_(False) for n, (i, o) in shapes.items()}
        )
        self.a = nn.ModuleDict({n: nn.Linear(i, rank, bias=False) for n, (i, _) in shapes.items()})
        self.b = nn.ModuleDict({n: nn.Linear(rank, o, bias=False) for n, (_, o) in shapes.items()})

    def one(self, name: str, x: Tensor) -> Tensor:
        return self.base[name](x) + self.b[name](self.a[name](x))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        attended = self.one("o", self.one("q", x))
        return (
            self.one("k", x),
            self.one("v", x),
            self.one("down", self.one("gate", attended) + self.one("up", attended)),
        )


def linears(tokens: int) -> Callable[[float], Callable[[], None]]:
    from sparsetrain.methods.token_selection.passes import AllRows, Notes, SelectedRows
    from sparsetrain.methods.token_selection.policies import Batch, draw
    from sparsetrain.ops.selected_rows import take_rows

    torch.manual_seed(0)
    stack, x = LinearsOfABlock(), torch.randn(1, tokens, 576)
    dy = [torch.randn(1, tokens, width) for width in (192, 192, 576)]
    ids = torch.randint(0, 100, (1, tokens))

    def run(ratio: float) -> Callable[[], None]:
        def dense() -> None:
            torch.autograd.backward(stack(x.detach().requires_grad_()), dy)

        def selected() -> None:
            rows = draw(TokenSelection(keep_ratio=ratio), Batch.of({"input_ids": ids}, causal=True), step=0)
            inputs, notes = x.detach().requires_grad_(), Notes(rows)
            with torch.no_grad(), AllRows(notes):
                stack(inputs)
            with SelectedRows(notes):
                outputs = stack(take_rows(inputs, rows))
            torch.autograd.backward(outputs, [rows.gather(d) for d in dy])

        return dense if ratio == 1 else selected

    return run


def head(tokens: int, words: int = 49152, d: int = 576) -> Callable[[float], Callable[[], None]]:
    from sparsetrain.ops.selected_loss import selected_loss

    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(tokens, d, generator=generator), torch.randn(words, d, generator=generator) * 0.02
    target = torch.randint(0, words, (tokens,), generator=generator)

    def run(ratio: float) -> Callable[[], None]:
        def loss() -> None:
            x = hidden.detach().requires_grad_()
            rows = torch.randperm(tokens)[: round(ratio * tokens)].sort().values
            chosen, targets = (x, target) if ratio == 1 else (x.index_select(0, rows), target[rows])
            selected_loss(chosen, weight, targets).backward()

        return loss

    return run


Sides = tuple[Callable[[], object], Callable[[float], Callable[[], object]]]


def sides(part: str, tokens: int, layers: int | None) -> Sides:
    """(the dense step, the step on a share of the tokens) of one part."""
    if part in ("linear", "head"):
        at = (linears if part == "linear" else head)(tokens)
        return at(1.0), at
    trainee = Trainee(tokens, layers)
    policy = "loss" if part.endswith("policy loss") else "random"
    again = part == "checkpointing"
    return lambda: trainee.step(1.0, checkpointing=again), lambda r: lambda: trainee.step(r, policy=policy)


def measure(part: str, ratio: float, settings: dict[str, Any], of_part: Callable[..., Sides]) -> dict[str, Any]:
    tokens, layers = settings["tokens"], settings["layers"]
    dense, at = of_part(part, tokens, layers)
    timed = compare(dense, at(ratio), rounds=settings["rounds"])
    row = {"case_id": f"C1 {part} r={ratio}", "part": part, "ratio": ratio, "tokens": tokens}
    return row | {"dtype": "float32", "layers": layers, "target": TARGETS[part](ratio), **timed.to_dict()}


def memory(name: str, layers: int | None, threads: int) -> dict[str, Any]:
    """Peak of resident memory of a fresh process, at r = 0.3, and the bytes that a forward saves."""
    found = in_own_process("bench.methods.token_selection.step:cell", name, layers, threads)
    return {"case_id": f"C1 memory {name}", "part": "memory", "layers": layers, **found}


def cell(name: str, layers: int | None, threads: int, tokens: int = 1024) -> dict[str, Any]:
    torch.set_num_threads(threads)
    trainee = Trainee(tokens, layers)
    ratio, plain = (0.3 if name.startswith("tokens") else 1.0), name in ("lora", "lora+checkpointing")
    trainee.recompute(name.endswith("checkpointing"))
    before = peak_memory().rss_peak_bytes
    for _ in range(2):
        trainee.step(ratio, name.endswith("checkpointing"), plain)
    peak = peak_memory().rss_peak_bytes
    saved = saved_activations(trainee.model, lambda: trainee.loss(ratio, plain))
    blocks = sum(sum(layer.values()) for layer in saved.by_layer.values())
    return {
        "tokens": tokens,
        "model_bytes": before,
        "peak_bytes": peak,
        "saved_bytes": saved.total,
        "block_bytes": blocks,
    }


def cells(asked: Asked) -> list[Cell]:
    of_part = functools.lru_cache(maxsize=1)(sides)
    layers = asked.settings["layers"]

    def timed(part: str, ratio: float) -> Cell:
        return Cell(f"C1 {part} r={ratio}", lambda: measure(part, ratio, asked.settings, of_part))

    found = [
        timed(part, ratio) for part in PARTS for ratio in ((0.3,) if part.endswith("policy loss") else (0.1, 0.3, 0.5))
    ]
    if asked.settings["memory"]:
        found += [Cell(f"C1 memory {name}", lambda name=name: memory(name, layers, asked.threads)) for name in CELLS]
    return found


BENCHMARKS = [
    Benchmark(
        name="token_selection",
        measures="a training step on selected tokens, its parts and memory, against the dense step, SmolLM2, LoRA",
        cells=cells,
        settings={"tokens": 2048, "layers": None, "rounds": 5, "memory": True},
        quick={"tokens": 256, "layers": 2, "rounds": 3, "memory": False},
        threads=2,
        key_of=lambda row: row["case_id"],
        shows=("median", "q1", "q3", "target", "verdict", "saved_bytes", "peak_bytes"),
    )
]
