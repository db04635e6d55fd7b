"""A small diffusion Transformer made 2:4 sparse: FID and multiply-adds beside dense training of equal further steps.

Cells, by seed:

- `start SEED`: a DiT from random weights, dense. Its run stays in the folder `work`, and goes on where it was stopped.
- `ARM SEED`: that model trained on. `dense`: without masks, the baseline. `one-shot`: masked, not trained on. `ste` and
  `sr-ste`: without teacher, λ = 0 and 2e-4. `teacher`: with it, as published. `plan`: 7:8, 6:8, 5:8, 4:8 and 2:4, a
  fifth of the steps each. `plan+teacher`: both.
- `pictures`: the first samples of every arm of the first seed as rows of one sheet, in `work`, from where
  `python -m bench docs` takes it to the docs.
- `export`: of the `teacher` arm, first seed: how far the exported model's outputs are from the masked one's, and the
  time of a forward of both and of the dense one, in turns.

FID and KID are of the average of the weights, by features of a classifier that is trained here, from the same noise and
labels in every arm: they compare models of the same data here, and with no published number. Further steps are equal,
not time: a masked step chooses masks, and a teacher is a forward more (`step_s`).

    python -m bench run sparsedm --output DIR [--cells '* 0'] [--minutes 60]
"""

from __future__ import annotations

import functools
import statistics
import time
from pathlib import Path
from typing import Any

from bench.runner import Asked, Benchmark, Cell, in_own_process

SEEDS = (0, 1, 2)
ARMS = ("dense", "one-shot", "ste", "sr-ste", "teacher", "plan", "plan+teacher")
COMMON = {"task": "diffusion", "weight_decay": 0.03, "ema_decay": 0.999, "lr_schedule": "constant"}
SHOWN = 16
RATIOS = ("7:8", "6:8", "5:8", "4:8", "2:4")


def methods(arm: str, steps: int) -> list[dict[str, Any]]:
    """The recipe's methods."""
    if arm == "dense":
        return []
    plan = [f"{i * steps // len(RATIOS)}:{ratio}" for i, ratio in enumerate(RATIOS)] if "plan" in arm else []
    lam = 0.0 if arm == "ste" else 2e-4
    return [{"method": "sparsedm", "plan": plan, "lam": lam, "teacher_weight": 0.1 if "teacher" in arm else 0.0}]


def start(seed: int, settings: dict[str, Any], threads: int) -> dict[str, Any]:
    """The dense model that every arm of a seed goes on from."""
    from sparsetrain.hf.train.pretrain import pretrain
    from sparsetrain.recipes.pretrain import PretrainRecipe

    folder = Path(settings["work"]) / f"start-{seed}"
    given = {**COMMON, "model": "dit-nano", "set": settings["model"], "steps": settings["start_steps"], "seed": seed}
    given |= {
        "lr": settings["start_lr"],
        "warmup_steps": settings["start_steps"] // 20,
        **_run(folder, settings, threads),
    }
    result = pretrain(PretrainRecipe.from_values(given), write=False)
    return {"saved": str(result.saved), **_of(result, settings["start_steps"])}


def train(arm: str, seed: int, settings: dict[str, Any], threads: int, model: str) -> dict[str, Any]:
    """One arm: what it costs, and what its samples are like."""
    from sparsetrain.hf.model.io import load
    from sparsetrain.hf.train.finetune import finetune
    from sparsetrain.recipes.finetune import Recipe

    steps, folder = settings["steps"], Path(settings["work"]) / f"{arm}-{seed}"
    asked, found = methods(arm, settings["steps"]), {}
    if arm == "one-shot":
        loaded = load(model)
        handle: Any = _masked(loaded.model)
    else:
        given = {
            **COMMON,
            "model": model,
            "methods": asked,
            "steps": steps,
            "lr": settings["lr"],
            "seed": seed,
            "lora_r": 0,
        }
        given |= {
            "warmup_steps": steps // 40,
            "deploy": "sparse" if asked else "dense",
            **_run(folder, settings, threads),
        }
        result = finetune(Recipe.from_values(given), write=False)
        found, loaded = {"saved": str(folder), **_of(result, steps)}, load(result.saved)
        handle = loaded.handle
    return {**_macs(loaded.model, handle), **_quality(loaded.model, arm, seed, settings), **found}


def _run(folder: Path, settings: dict[str, Any], threads: int) -> dict[str, Any]:
    begun = any(folder.glob("checkpoint-*"))
    chosen = {key: settings[key] for key in ("data", "batch_size", "dtype", "save_every", "eval_tokens")}
    return {**chosen, "threads": threads, "output": str(folder), "resume": begun, "eval_every": 0}


def _of(result: Any, steps: int) -> dict[str, Any]:
    run = result.run
    times = [step["step_time_s"] for step in run["steps"]]
    return {
        "steps": steps,
        "noise_loss": run["evals"][-1]["loss"],
        "step_s": statistics.median(times),
        "run_s": sum(times),
        "resumed_from": result.resumed_from,
    }


def _masked(model: Any) -> Any:
    from sparsetrain import SparseDM, sparsify

    return sparsify(model, SparseDM(teacher_weight=0.0))


def _macs(model: Any, handle: Any) -> dict[str, Any]:
    """Multiply-adds of one image, of the masked layers and of the whole model."""
    import torch

    from sparsetrain.methods.sparsedm.macs import count_macs
    from sparsetrain.planner.image_sizes import image_size

    batch = {"pixel_values": torch.zeros(1, model.config.num_channels, *image_size(model.config))}
    probe = handle or _masked(model)
    found = count_macs(probe, model, batch)
    if handle is None:  # the dense arm
        probe.restore()
        return {"macs": found.model, "macs_saved": 0.0, "target_macs": found.targets[0]}
    dense, after = found.whole
    return {"macs": after, "macs_saved": 1 - after / dense, "target_macs": found.targets[1]}


def _quality(model: Any, arm: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """FID and KID of samples, a grid of the first ones, and of the held-out images for comparison."""
    from sparsetrain.hf.data import load_images
    from sparsetrain.hf.model.sampling import sample
    from sparsetrain.hf.train.image_quality import drawn_labels, image_quality
    from sparsetrain.measure.pictures import image_grid

    bundle, steps = load_images(settings["data"]), settings["sampling_steps"]
    num, work = settings["samples"], Path(settings["work"])
    work.mkdir(parents=True, exist_ok=True)
    images = sample(model, num, labels=drawn_labels(model, bundle, num), steps=steps, seed=1)
    first = sample(model, SHOWN, steps=steps, seed=2)
    grid = work / f"{arm}-{seed}.png"
    grid.write_bytes(image_grid(first, SHOWN))
    found = dict(image_quality(images, bundle, steps=steps))
    return {**found, "grid": str(grid)}


def pictures(settings: dict[str, Any], *arms: dict[str, Any]) -> dict[str, Any]:
    """The arms' rows under one another."""
    import numpy as np
    from PIL import Image

    rows = [np.asarray(Image.open(row["grid"]).convert("L")) for row in arms]
    sheet = Path(settings["work"]) / "arms.png"
    Image.fromarray(np.concatenate(rows)).save(sheet)
    return {"sheet": str(sheet), "rows": list(ARMS), "fid": [row["fid"] for row in arms]}


def export(path: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The exported model beside the masked one and the dense one: outputs, and the time of a forward in turns."""
    import torch

    from sparsetrain.core.errors import Unsupported
    from sparsetrain.hf.model.io import load
    from sparsetrain.methods.sparsedm.export import pack_24, to_dense
    from sparsetrain.planner.image_sizes import image_size

    masked, other, dense = load(path), load(path), load(path)
    names = list(masked.handle.sites("sparsedm"))  # type: ignore[union-attr]
    plain: Any = to_dense(other.handle)  # type: ignore[arg-type]
    dense.handle.restore()  # type: ignore[union-attr]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(
        settings["batch_size"], masked.model.config.num_channels, *image_size(masked.model.config), generator=draw
    )
    t = torch.randint(masked.model.config.noise_steps, (len(x),), generator=draw)
    ways = {"masked": masked.model, "exported": plain, "dense": dense.model}
    times: dict[str, list[float]] = {name: [] for name in ways}
    outputs: dict[str, Any] = {}
    with torch.no_grad():
        for _ in range(settings["turns"] + 1):
            for name, model in ways.items():
                began = time.perf_counter()
                outputs[name] = model.eval().denoise(x, t)
                times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}
    try:
        packed = f"packed; dense stay {pack_24(plain, names)}"
    except Unsupported as error:
        packed = str(error)
    return {
        "largest_difference": float((outputs["exported"] - outputs["masked"]).abs().max()),
        "masked_of_dense": medians["masked"] / medians["dense"],
        "exported_of_dense": medians["exported"] / medians["dense"],
        "packed": packed,
    }


def cells(asked: Asked) -> list[Cell]:
    """All arms of the first seed, then of the others."""
    settings, threads, found = asked.settings, asked.threads, []
    call = functools.partial(in_own_process, environment={"OMP_NUM_THREADS": str(threads)})
    for seed in asked.seeds:
        begin = functools.partial(call, f"{__name__}:start", seed, settings, threads)
        found.append(Cell(f"start {seed}", begin, leaves=("saved",)))
        for arm in ARMS:
            own = _arm(call, arm, seed, settings, threads)
            found.append(Cell(f"{arm} {seed}", own, uses=(f"start {seed}",), leaves=("saved", "grid")))
        if seed == asked.seeds[0]:
            rows = tuple(f"{arm} {seed}" for arm in ARMS)
            found.append(Cell("pictures", functools.partial(pictures, settings), uses=rows))
            found.append(Cell("export", functools.partial(_export, call, settings), uses=(f"teacher {seed}",)))
    return found


def _arm(call: Any, arm: str, seed: int, settings: dict[str, Any], threads: int) -> Any:
    return lambda begun: call(f"{__name__}:train", arm, seed, settings, threads, begun["saved"])


def _export(call: Any, settings: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    return call(f"{__name__}:export", trained["saved"], settings)


BENCHMARKS = [
    Benchmark(
        name="sparsedm",
        measures="a DiT made 2:4: FID, KID and multiply-adds beside dense training of equal further steps",
        cells=cells,
        settings={
            "data": "fashion-mnist",
            "work": "runs/bench-sparsedm",
            "model": {"attention_head_dim": 32, "patch_size": 4},
            "start_steps": 2000,
            "start_lr": 1e-3,
            "steps": 500,
            "lr": 2e-4,
            "batch_size": 64,
            "save_every": 250,
            "eval_tokens": 16384,
            "samples": 1024,
            "sampling_steps": 25,
            "turns": 20,
            "dtype": "fp32",
        },
        quick={
            "data": "digits",
            "work": "runs/bench-sparsedm-quick",
            "model": {"sample_size": 8, "patch_size": 2, "num_layers": 2},
            "start_steps": 20,
            "steps": 10,
            "eval_tokens": 1024,
            "batch_size": 16,
            "samples": 64,
            "sampling_steps": 5,
            "turns": 3,
        },
        seeds=SEEDS,
        threads=2,
        dtype="float32",
        shows=("noise_loss", "fid", "kid", "macs_saved", "step_s", "largest_difference", "exported_of_dense"),
    )
]
