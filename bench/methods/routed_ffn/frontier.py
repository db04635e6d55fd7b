"""What converting SmolLM2's FFNs costs in perplexity and gives in time: one row a configuration.

Perplexity: held-out Python source, windows of 1,024 tokens, before any training. Time: forward and backward of one
converted FFN under LoRA, router and compensation included, against the same dense FFN under LoRA, in turns. Training,
for some of the rows and for dense LoRA: `finetune` with 200 steps of 512 tokens; the demo's row is distilled before.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import tempfile
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from bench.runner import Asked, Benchmark, Cell
from sparsetrain import RoutedFFN, sparsify
from sparsetrain.core.anatomy import describe
from sparsetrain.hf.train import assemble
from sparsetrain.hf.train.evaluate import evaluate
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.hf.train.rows import calibration_batches
from sparsetrain.measure.timing import compare
from sparsetrain.methods.routed_ffn.calibrate import convert_site, read_inputs
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.runs.events import silent
from sparsetrain.surgery.method import State
from sparsetrain.surgery.plan import plan
from sparsetrain.surgery.sensitivity import layer_losses

LATER = tuple(range(14, 30))
CHOSEN = (*range(3, 8), *range(9, 19), *range(20, 25), *range(26, 29))  # what the sensitivities leave
LIGHT = (4, 6, 7, 14, 16, 17, 18, 20, 24, 27)  # the ten cheapest alone
ALL = tuple(range(30))
TRAINED = ("dense", "light", "demo")
DISTILL_STEPS = {"demo": 40}


def row(active: int, blocks: int, shared: float, layers: tuple[int, ...], rank: int = 96, **more: Any) -> RoutedFFN:
    return RoutedFFN.converted(
        num_active=active,
        num_blocks=blocks,
        shared_ratio=shared,
        layers=layers,
        from_depth=0.0,
        compensation_rank=rank,
        **more,
    )


ROWS: dict[str, RoutedFFN] = {
    "demo": row(1, 4, 1 / 2, CHOSEN),
    "light": row(1, 4, 1 / 2, LIGHT),
    "all-5/8": row(1, 4, 1 / 2, ALL),
    "all-half": row(1, 8, 3 / 7, ALL, rank=128),
    "all-half-coarse": row(1, 4, 1 / 3, ALL),
    "later-half-8": row(2, 8, 1 / 3, LATER, rank=64),
    "later-half-4": row(1, 4, 1 / 3, LATER),
    "later-half-32": row(8, 32, 1 / 3, LATER),
    "later-half-no-shared": row(4, 8, 0.0, LATER),
    "later-quarter": row(1, 16, 1 / 5, LATER, rank=128),
    "later-half-contiguous": RoutedFFN(num_blocks=8, num_active=4, layers=LATER),
    "all-half-contiguous": RoutedFFN(num_blocks=8, num_active=4, layers=ALL),
}


def train(config: RoutedFFN | None, distill_steps: int, threads: int) -> dict[str, Any]:
    """Perplexity at each stage and every 50 steps, with the seconds since the first step; `setup_s` comes before it."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(
            model="smollm2-135m",
            data="python-stdlib",
            methods=[] if config is None else [config.to_dict()],
            output=f"{folder}/run",
            seq_len=512,
            steps=200,
            lr=5e-4,
            warmup_steps=10,
            calibration_tokens=16384,
            distill_steps=distill_steps,
            eval_every=50,
            eval_tokens=8192,
            save_every=0,
            threads=threads,
        )
        run: Any = finetune(recipe, write=False).run
    evals = [{name: point[name] for name in ("step", "wall_s", "perplexity")} for point in run["evals"]]
    return {"stages": run["perplexity"], "evals": evals, "setup_s": run.get("setup_s", 0.0)}


class Opened:
    """SmolLM2 with rows for calibration and evaluation, opened when first needed."""

    def __init__(self) -> None:
        recipe = Recipe(
            model="smollm2-135m",
            data="python-stdlib",
            preset="dense",
            seq_len=1024,
            calibration_tokens=16384,
            eval_tokens=8192,
        )
        self.parts = assemble.open_parts(recipe, silent)
        self.model, _ = assemble.load_model(self.parts)
        self.calibration = calibration_batches(self.parts)
        self.dense = self._loss()

    def _loss(self) -> float:
        bundle = self.parts.bundle
        assert bundle.eval is not None
        return evaluate(self.model, bundle.eval, bundle.collate_fn, max_tokens=self.parts.recipe.eval_tokens).loss

    def quality(self, config: RoutedFFN) -> dict[str, float]:
        handle = sparsify(self.model, config, state=self.state(config))
        handle.step(1, 1)
        loss = self._loss()
        handle.restore()
        return {
            "dense_perplexity": math.exp(self.dense),
            "perplexity": math.exp(loss),
            "times_dense": math.exp(loss - self.dense),
        }

    def state(self, config: RoutedFFN) -> State:
        """What `sparsify` finds from the calibration rows, which are read once for all configurations."""
        if not config.needs_calibration:
            return {}
        torch.manual_seed(0)  # as `sparsify`
        sites = {site.name: site for site in describe(self.model).ffns}
        return {
            edit.key: convert_site(self.model, config, sites[edit.site], *self.inputs[edit.site])
            for edit in plan(self.model, config).edits
        }

    @functools.cached_property
    def inputs(self) -> dict[str, tuple[Tensor, Tensor]]:
        return read_inputs(self.model, describe(self.model).ffns, self.calibration or [])

    def sensitivity(self, config: RoutedFFN) -> dict[int, float]:
        bundle = self.parts.bundle
        assert bundle.eval is not None
        held_out = [bundle.collate_fn([bundle.eval[i]]) for i in range(3)]
        return layer_losses(self.model, config, held_out, calibration=self.calibration)

    def speedup(self, config: RoutedFFN, tokens: int) -> dict[str, Any]:
        """Layer 20, converted on two rows, beside layer 21, left dense; both in PEFT's LoRA, base frozen."""
        handle = sparsify(
            self.model, dataclasses.replace(config, layers=(20,)), calibration=(self.calibration or [])[:2]
        )
        handle.step(1, 1)
        lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", modules_to_save=handle.modules_to_save)
        model: Any = get_peft_model(self.model, lora).train()
        sparse, dense = (model.base_model.model.model.layers[i].mlp for i in (20, 21))
        x, grad = torch.randn(2, 1, tokens, 576)
        x.requires_grad_()
        found = compare(lambda: dense(x).backward(grad), lambda: sparse(x).backward(grad), rounds=9)
        model.unload()
        handle.restore()
        return {
            "median": round(found.median, 3),
            "quartiles": [round(found.q1, 3), round(found.q3, 3)],
            "dense_ms": round(1e3 * statistics.median(found.baseline_s), 1),
        }


def _values(config: RoutedFFN) -> dict[str, Any]:
    return config.to_dict() | {"active_ratio": round(config.active_ratio, 3)}


def cells(asked: Asked) -> list[Cell]:
    """A row a configuration, and in it: the configuration, perplexity before training, times, one training."""
    opened = functools.cache(Opened)
    found = []
    for name in ("dense", *ROWS):
        config = ROWS.get(name)
        if config is not None:
            found.append(Cell(f"{name} config", functools.partial(_values, config), (name, "config")))
            found.append(Cell(f"{name} quality", lambda c=config: opened().quality(c), (name, "quality")))
            for tokens in asked.settings["tokens"]:
                time = functools.partial(lambda c, n: opened().speedup(c, n), config, tokens)
                found.append(Cell(f"{name} time {tokens}", time, (name, "speedup", str(tokens))))
        if name == "all-5/8":
            losses = functools.partial(lambda c: opened().sensitivity(c), config)
            found.append(Cell(f"{name} layer losses", losses, (name, "layer_losses")))
        if name in TRAINED:
            trained = functools.partial(train, config, DISTILL_STEPS.get(name, 0), asked.threads)
            found.append(Cell(f"{name} training", trained, (name, "trained")))
    return found


BENCHMARKS = [
    Benchmark(
        name="routed_ffn_frontier",
        measures="what converting SmolLM2's FFNs costs in perplexity and gives in time, a row a configuration",
        cells=cells,
        settings={"tokens": [1024, 2048, 4096]},
        quick={"tokens": [128]},
        threads=2,
        under="rows",
        shows=("median", "times_dense"),
    )
]
