"""How far the gradient of selected tokens is from the dense one: SmolLM2 with LoRA, one batch, many draws.

For each policy and share r: the cosine to the dense gradient of one draw (mean and standard deviation over draws) and
of the mean gradient over all draws. More draws remove variance and leave bias, so the second column's distance from 1
is what averaging over steps cannot repair. `length` is |mean gradient| / |dense gradient|.
"""

from __future__ import annotations

import functools
import statistics
from typing import Any

import torch
from torch import Tensor

from bench.runner import Asked, Benchmark, Cell
from sparsetrain import TokenSelection, sparsify

POLICIES: dict[str, dict[str, Any]] = {
    "random": {},
    "unbiased": {"unbiased": True},
    "prefix": {"policy": "prefix"},
    "loss": {"policy": "loss"},
    "gradient_norm": {"policy": "gradient_norm"},
}
ALWAYS_THE_SAME = ("prefix", "loss", "gradient_norm")


class Trainee:
    """SmolLM2-135M with LoRA r=16 whose second factors are drawn, so that every factor has a gradient."""

    def __init__(self, tokens: int) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from sparsetrain.hf.assets import resolve_data, resolve_model
        from sparsetrain.hf.data import load_text

        path = resolve_model("smollm2-135m")
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
        model.config.use_cache = False
        self.handle = sparsify(model, TokenSelection())
        self.selector: Any = next(iter(self.handle.sites("token_selection").values())).selector
        torch.manual_seed(0)
        self.model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")).train()
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        rows = load_text(resolve_data("python-stdlib"), AutoTokenizer.from_pretrained(path), tokens)
        self.batch = rows.collate_fn([rows.train[i] for i in range(2)])

    def gradient(self, config: TokenSelection, step: int) -> Tensor:
        self.selector.config, self.selector.step = config, step
        self.model.zero_grad(set_to_none=True)
        self.model(**self.batch).loss.backward()
        return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])


def measure(trainee: Trainee, policy: str, ratio: float, dense: Tensor, draws: int) -> dict[str, Any]:
    config = TokenSelection(keep_ratio=ratio, **POLICIES[policy])
    total, cosines = torch.zeros_like(dense), []
    count = 1 if policy in ALWAYS_THE_SAME else draws
    for step in range(count):
        gradient = trainee.gradient(config, step)
        total += gradient / count
        cosines.append(torch.cosine_similarity(gradient, dense, dim=0).item())
    return {
        "policy": policy,
        "ratio": ratio,
        "draws": count,
        "cosine": round(statistics.mean(cosines), 4),
        "cosine_sd": round(statistics.stdev(cosines), 4) if count > 1 else None,
        "cosine_of_mean": round(torch.cosine_similarity(total, dense, dim=0).item(), 4),
        "length_of_mean": round((total.norm() / dense.norm()).item(), 4),
    }


def cells(asked: Asked) -> list[Cell]:
    trainee = functools.cache(lambda: Trainee(asked.settings["tokens"] // 2))
    dense = functools.cache(lambda: trainee().gradient(TokenSelection(keep_ratio=1.0), 0))

    def cell(policy: str, ratio: float) -> Cell:
        draws = asked.settings["draws"]
        return Cell(f"{policy} r={ratio}", lambda: measure(trainee(), policy, ratio, dense(), draws))

    return [cell(policy, ratio) for ratio in asked.settings["ratios"] for policy in POLICIES]


BENCHMARKS = [
    Benchmark(
        name="token_selection_bias",
        measures="how far the gradient of selected tokens is from the dense one, SmolLM2 with LoRA",
        cells=cells,
        settings={"tokens": 512, "ratios": [0.1, 0.3, 0.5], "draws": 8},
        quick={"tokens": 128, "ratios": [0.3], "draws": 2},
        key_of=lambda row: f"{row['policy']} r={row['ratio']}",
        shows=("cosine", "cosine_of_mean", "length_of_mean"),
        about=lambda asked: {"tokens": asked.settings["tokens"]},
    )
]
