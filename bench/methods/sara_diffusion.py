"""SaRA on a diffusion model: a DiT that knows some classes learns another, beside LoRA of as many numbers and full
fine-tuning; what it learns, and what it forgets.

A DiT is pretrained on Fashion-MNIST without one class, then fine-tuned on that class alone. Cells:

- `pretrained SEED`: the model, kept in `models`; its distances from the old and the new images.
- `ARM SIZE SEED`: one `finetune` of the same steps and rows: held-out noise loss on the new class and on the old ones,
  FID and KID of samples of the new class from its images (the new domain), and of samples of the old classes from
  theirs (forgetting). Full fine-tuning has one size.

FID and KID stand on the features of one classifier, trained here on all ten classes: they compare the arms of this
table and nothing else. Its combined index is that of SaRA's paper (arXiv 2409.06633), with forgetting in place
of the CLIP score, which needs captions. Per size and seed, over the arms:

    VLHI = (max F - F) / (max F - min F) + (C - min C) / (max C - min C),   F = FID (new), C = -FID (old)

    python -m bench run sara_diffusion --output DIR --set models=DIR [--cells 'lora *'] [--minutes 60]
"""

from __future__ import annotations

import gzip
import shutil
import statistics
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.runner import Asked, Benchmark, Cell, in_own_process

HELD_OUT = 9
"""The class that is learned afterwards: boots, which look like nothing but sneakers."""
SIZES: dict[str, tuple[float, int]] = {"small": (0.038, 1), "medium": (0.114, 3), "large": (0.343, 9)}
"""SaRA's share of the linears' 221,950 entries, and LoRA's rank, of 8,464 numbers each: as many in both."""
MODEL: dict[str, Any] = {"num_embeds_ada_norm": 10}
LR = {"lora": 1e-3, "full": 2e-4}


def arms(size: str) -> dict[str, dict[str, Any]]:
    """What is trained at a size; SaRA's learning rate follows from its threshold."""
    fraction, rank = SIZES[size]
    sara = {"methods": [{"method": "sara", "fraction": fraction}], "lora_r": 0}
    return {
        "sara": sara,
        "sara lr=1e-3": {**sara, "lr": 1e-3},
        "lora": {"methods": [], "lora_r": rank, "lora_alpha": rank, "lr": LR["lora"]},
    }


FULL = {"methods": [], "lora_r": 0, "lr": LR["full"]}


def write_classes(source: Path, folder: Path, classes: list[int]) -> Path:
    """MNIST's four files with the images of some classes alone, under their own labels."""
    from sparsetrain.data.images import read_idx

    folder.mkdir(parents=True, exist_ok=True)
    for prefix in ("train", "t10k"):
        images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz", num_dims=3)
        labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz", num_dims=1)
        kept = np.isin(labels, classes)
        for name, array in (("images-idx3", images[kept]), ("labels-idx1", labels[kept])):
            header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
            path = folder / f"{prefix}-{name}-ubyte.gz"
            path.write_bytes(gzip.compress(header + array.tobytes(), 1, mtime=0))
    return folder


def domains(folder: Path, data: str) -> dict[str, Path]:
    """The old classes and the new one, as folders of their own."""
    from sparsetrain.hf.assets import resolve_data

    source = Path(resolve_data(data))
    old = [label for label in range(10) if label != HELD_OUT]
    return {
        name: write_classes(source, folder / name, classes) for name, classes in {"old": old, "new": [HELD_OUT]}.items()
    }


def pretrained(seed: int, settings: dict[str, Any], threads: int, place: str) -> dict[str, Any]:
    """Pretrain on the old classes into `place`."""
    from sparsetrain.hf.train.pretrain import pretrain
    from sparsetrain.recipes.pretrain import PretrainRecipe

    shutil.rmtree(place, ignore_errors=True)  # what a cell that was stopped has left
    with tempfile.TemporaryDirectory() as folder:
        data = domains(Path(folder), settings["data"])
        values = {"model": "dit-nano", "set": MODEL, "data": str(data["old"]), "task": "diffusion", "output": place}
        values |= {"steps": settings["pretrain_steps"], "batch_size": settings["batch_size"], "lr": 2e-3, "seed": seed}
        values |= {"warmup_steps": settings["pretrain_steps"] // 20, "save_every": 0, "threads": threads}
        values |= {"eval_tokens": settings["eval_tokens"], "dtype": settings["dtype"]}
        result: Any = pretrain(PretrainRecipe.from_values(values))
        found = measured(result.saved, data, settings)
    return {"parameters": result.parameters, "folder": str(result.saved), **found}


def tuned(arm: dict[str, Any], seed: int, settings: dict[str, Any], threads: int, model: str) -> dict[str, Any]:
    """Fine-tune on the new class."""
    from sparsetrain.hf.train.finetune import finetune
    from sparsetrain.recipes.finetune import Recipe

    with tempfile.TemporaryDirectory() as folder:
        data = domains(Path(folder), settings["data"])
        values = {"model": model, "data": str(data["new"]), "task": "diffusion", "output": f"{folder}/run", **arm}
        values |= {"steps": settings["steps"], "batch_size": settings["batch_size"], "seed": seed, "threads": threads}
        values |= {"warmup_steps": settings["steps"] // 20, "save_every": 0, "eval_tokens": settings["eval_tokens"]}
        result: Any = finetune(Recipe.from_values(values | {"dtype": settings["dtype"]}))
        found = measured(Path(f"{folder}/run"), data, settings)
    run = result.run
    return {
        "trained": result.trainable_parameters,
        "lr": max(step["learning_rate"] for step in run["steps"]),
        "step_s": statistics.median(step["step_time_s"] for step in run["steps"]),
        "optimizer_bytes": run["static_bytes"]["optimizer_trainable"],
        **found,
    }


def measured(run: Path, data: Mapping[str, Path], settings: dict[str, Any]) -> dict[str, Any]:
    """Of each domain: held-out noise loss, and FID and KID of as many samples, by features of all ten classes."""
    from sparsetrain.hf.data import load_images
    from sparsetrain.hf.data.images import arrays_of
    from sparsetrain.hf.model.io import load
    from sparsetrain.hf.model.sampling import sample
    from sparsetrain.hf.train.evaluate import evaluate
    from sparsetrain.measure.image_distance import frechet_distance, kernel_distance
    from sparsetrain.measure.image_features import trained

    whole = load_images(settings["data"])
    assert whole.eval is not None
    features = trained(arrays_of(whole.train), arrays_of(whole.eval))
    model, found = load(run).model, {}
    for name, folder in data.items():
        bundle = load_images(str(folder), max_eval_rows=settings["eval_images"])
        assert bundle.eval is not None
        rows: Any = bundle.eval.add_column("row", list(range(len(bundle.eval))))  # type: ignore[call-arg]
        quality = evaluate(model, rows, bundle.collate_fn, task="diffusion", batch_size=settings["batch_size"])
        pixels, labels = arrays_of(bundle.train)
        chosen = np.linspace(0, len(pixels) - 1, settings["samples"]).astype(int)
        asked = np.sort(labels)[chosen].tolist()
        made = features.features(sample(model, len(asked), labels=asked, steps=settings["sampling_steps"]))
        real = features.features(pixels[: settings["real_images"]])
        found |= {f"loss_{name}": quality.loss, f"fid_{name}": frechet_distance(made, real)}
        found[f"kid_{name}"] = kernel_distance(made, real)
    return {**found, "features": features.says}


def vlhi(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Arm -> the combined index among these arms: 2 is best in both, 0 worst in both.

    Where all arms are equal in one of the two, it says nothing of them, and counts 0.
    """
    new = {arm: values["fid_new"] for arm, values in found.items()}
    kept = {arm: -values["fid_old"] for arm, values in found.items()}

    def share(value: float, low: float, high: float) -> float:
        return (value - low) / (high - low) if high > low else 0.0

    lowest, highest = min(new.values()), max(new.values())
    return {
        arm: share(-new[arm], -highest, -lowest) + share(kept[arm], min(kept.values()), max(kept.values()))
        for arm in found
    }


def indices(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Size -> arm -> the index among SaRA, LoRA and full fine-tuning, a number a seed that has all three; SaRA's second
    rate is left out, as the index of each arm depends on which others there are."""
    found: dict[str, dict[str, list[float]]] = {}
    for size in SIZES:
        for seed in sorted({key.split()[-1] for key in cells}):
            names = {arm: f"{arm} {size} {seed}" for arm in ("sara", "lora")} | {"full": f"full all {seed}"}
            if set(names.values()) <= cells.keys():
                for arm, index in vlhi({arm: cells[key] for arm, key in names.items()}).items():
                    found.setdefault(size, {}).setdefault(arm, []).append(round(index, 4))
    return found


def cells(asked: Asked) -> list[Cell]:
    settings, threads, found = asked.settings, asked.threads, list[Cell]()
    here = f"{__name__}:"
    for seed in asked.seeds:
        place = str(Path(settings["models"] or tempfile.gettempdir()) / f"sara-diffusion-{seed}")
        base = f"pretrained {seed}"
        found.append(
            Cell(
                base,
                lambda given=(seed, settings, threads, place): in_own_process(here + "pretrained", *given),
                leaves=("folder",),
            )
        )
        runs = {f"{arm} {size} {seed}": values for size in SIZES for arm, values in arms(size).items()}
        for key, values in {f"full all {seed}": FULL, **runs}.items():

            def measure(start: dict[str, Any], values: dict[str, Any] = values, seed: int = seed) -> dict[str, Any]:
                return in_own_process(here + "tuned", values, seed, settings, threads, start["folder"])

            found.append(Cell(key, measure, uses=(base,)))
    return found


BENCHMARKS = [
    Benchmark(
        name="sara_diffusion",
        measures="SaRA on a diffusion model beside LoRA of as many numbers and full fine-tuning: a new class, and what "
        "is forgotten",
        cells=cells,
        settings={"data": "fashion-mnist", "pretrain_steps": 6000, "steps": 600, "batch_size": 64, "samples": 2048}
        | {"sampling_steps": 25, "real_images": 5000, "eval_images": 500, "eval_tokens": 24500, "dtype": "auto"}
        | {"models": None},
        quick={"pretrain_steps": 6, "steps": 2, "batch_size": 4, "samples": 16, "sampling_steps": 2}
        | {"real_images": 64, "eval_images": 8, "eval_tokens": 392},
        seeds=(0, 1, 2),
        threads=2,
        shows=("loss_new", "loss_old", "fid_new", "fid_old", "trained", "step_s"),
    )
]
