"""The examples run as they are written, on tiny data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.methods.deploy.grid import DEMO
from sparsetrain import ConceptBottleneck, SparseDM, TokenSelection
from sparsetrain.data.captions import CLOTHES, all_attributes
from sparsetrain.hf.model.architectures import check_task, open_architecture
from sparsetrain.hf.train import image_quality
from sparsetrain.hf.train.pretrain import stage_models
from sparsetrain.measure import image_features
from sparsetrain.methods.concept_bottleneck.config import read_concepts
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.recipes.pretrain import PretrainRecipe
from tests.cli.conftest import Call, save_llama

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_examples_are_short() -> None:
    assert all(len(path.read_text().splitlines()) <= 80 for path in EXAMPLES.iterdir() if path.is_file())


@pytest.mark.slow
def test_the_python_example(llama: Path, text: Path, tmp_path: Path) -> None:
    flags = ["--model", llama, "--data", text, "--seq-len", 64, "--steps", 2, "--output", tmp_path / "run"]
    command = [str(part) for part in (sys.executable, EXAMPLES / "finetune.py", *flags)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    values = [float(line.rpartition(": ")[2]) for line in done.stdout.splitlines() if line.startswith("perplexity")]
    assert len(values) == 4 and values[2] == pytest.approx(values[3], rel=1e-2)  # the saved adapter is the trained one


def test_the_demo_is_a_job_with_prompts_and_completions(call: Call, tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(EXAMPLES / "demo.yaml")
    assert (recipe.model, recipe.data, recipe.task) == ("smollm2-135m", "python-docstrings", "sft")
    assert recipe.compare == "dense" and recipe.deploy == "dense" and recipe.seq_len >= 1024
    (method,) = recipe.methods
    assert isinstance(method, TokenSelection) and method.pool == "targets"
    rows = [{"prompt": f"{number} and {number}", "completion": str(2 * number)} for number in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny = ("--model", save_llama(tmp_path / "model"), "--data", data, "--seq-len", 64, "--output", tmp_path / "run")
    assert call("finetune", "--recipe", EXAMPLES / "demo.yaml", *tiny, "--dry-run").code == 0


def test_the_recipe_of_spt(call: Call, text: Path, tmp_path: Path) -> None:
    llama = save_llama(tmp_path / "model", num_hidden_layers=30)  # the recipe names layers
    recipe = Recipe.from_yaml(EXAMPLES / "spt.yaml")
    assert recipe.compare == "dense" and (recipe.model, recipe.data) == ("smollm2-135m", "python-stdlib")
    assert [config.method for config in recipe.methods] == ["pq_attention", "routed_ffn"]
    assert recipe.methods[1].layers == DEMO  # the layers that the results are of
    tiny = ("--model", llama, "--data", text, "--seq-len", 64, "--output", tmp_path / "run")
    assert call("finetune", "--recipe", EXAMPLES / "spt.yaml", *tiny, "--dry-run").code == 0


PUBLISHED = {  # layers, block, quantile, batch, lr, warm-up, steps, probe: the authors' code, by task
    "image": (2, 32, 0.96, 128, 1e-4, 175, 10_000, 500),
    "listops": (4, 64, 0.98, 256, 7e-4, 1_000, 30_000, 500),
    "retrieval": (2, 64, 0.99, 32, 3e-4, 800, 40_000, 200),
    "text": (2, 64, 0.99, 32, 1e-4, 80, 30_000, 200),
    "pathfinder": (2, 32, 0.96, 256, 3e-4, 312, 50_000, 500),
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_the_recipes_of_spion_are_the_published_ones(task: str) -> None:
    recipe = PretrainRecipe.from_yaml(EXAMPLES / f"spion-{task}.yaml")
    config = open_architecture(recipe)
    check_task(config, recipe)
    method: Any = recipe.methods[0]
    found = (config.num_hidden_layers, method.block_tokens, method.quantile, recipe.batch_size)
    assert (*found, recipe.lr, recipe.warmup_steps, recipe.steps, method.probe_every) == PUBLISHED[task]
    assert (config.hidden_size, config.num_attention_heads, config.intermediate_size) == (64, 2, 128)
    assert recipe.clip_value == 1 and recipe.max_grad_norm == 0 and recipe.weight_decay == 0 and recipe.eps == 1e-6


def test_the_recipe_of_a_2_4_gpt(call: Call, text: Path, tmp_path: Path) -> None:
    flags = ("--data", text, "--seq-len", 64, "--output", tmp_path / "run", "--dry-run", "--set", "n_layer=2")
    assert call("pretrain", "--recipe", EXAMPLES / "gpt-2-4.yaml", *flags).code == 0
    check_task(open_architecture(recipe := PretrainRecipe.from_yaml(EXAMPLES / "vit-2-4.yaml")), recipe)


def test_the_recipe_of_sara(call: Call, text: Path, tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(EXAMPLES / "sara.yaml")
    assert recipe.lora_r == 0 and recipe.weight_decay == 0.01 and not recipe.trains_all
    tiny = ("--model", save_llama(tmp_path / "model"), "--data", text, "--seq-len", 64, "--output", tmp_path / "run")
    assert call("finetune", "--recipe", EXAMPLES / "sara.yaml", *tiny, "--dry-run").code == 0


def test_the_recipe_of_pst(call: Call, text: Path, tmp_path: Path) -> None:
    recipe = Recipe.from_yaml(EXAMPLES / "pst.yaml")
    assert (recipe.lora_r, recipe.deploy) == (0, "sparse") and [config.method for config in recipe.methods] == ["pst"]
    tiny = ("--model", save_llama(tmp_path / "model"), "--data", text, "--seq-len", 64)
    flags = ("--recipe", EXAMPLES / "pst.yaml", *tiny, "--steps", 4, "--warmup-steps", 0, "--eval-every", 0)
    assert call("finetune", *flags, "--output", tmp_path / "run").code == 0
    assert call("export", tmp_path / "run", "--output", tmp_path / "pruned", "--format", "pruned").code == 0
    assert (tmp_path / "pruned" / "model.safetensors").is_file()


def test_the_recipe_of_sparsedm() -> None:
    recipe = Recipe.from_yaml(EXAMPLES / "sparsedm.yaml")
    assert recipe.trains_all and recipe.deploy == "sparse" and recipe.averages == 0.999
    assert recipe.methods == (SparseDM(),) and recipe.weight_decay == 0.03


def test_the_recipes_of_monarch(call: Call, text: Path, tmp_path: Path) -> None:
    tiny = ("--data", text, "--seq-len", 64, "--output", tmp_path / "run", "--dry-run", "--set", "n_layer=2")
    assert call("pretrain", "--recipe", EXAMPLES / "gpt-monarch.yaml", *tiny).code == 0
    recipe = Recipe.from_yaml(EXAMPLES / "minilm-monarch.yaml")
    assert recipe.trains_all and recipe.deploy == "sparse" and recipe.methods[0].method == "monarch"


def test_the_recipe_of_a_v_cycle(call: Call, text: Path, tmp_path: Path) -> None:
    recipe = PretrainRecipe.from_yaml(EXAMPLES / "multi-level.yaml")
    assert recipe.compare == "dense" and [config.method for config in recipe.methods] == ["multi_level"]
    flags = ("--data", text, "--seq-len", 64, "--output", tmp_path / "run", "--dry-run")
    told = call("pretrain", "--recipe", EXAMPLES / "multi-level.yaml", *flags)
    assert told.code == 0 and "3, level 2: 2 layers x 64" in " ".join(told.out.split())


def test_the_recipe_of_a_growing_gpt(call: Call, text: Path, tmp_path: Path) -> None:
    flags = ("--data", text, "--seq-len", 64, "--output", tmp_path / "run", "--dry-run")
    shown = call("pretrain", "--recipe", EXAMPLES / "grow.yaml", *flags)
    assert shown.code == 0 and "hidden*2 heads*2 ffn*2, masked" in shown.out
    assert "1,601 to 1,680" in shown.out and "2,481 to 4,000" in shown.out


@pytest.mark.parametrize(
    ("name", "layers"), [("vit-multi-level", [4, 2, 4]), ("vit-grow", [2, 2, 2, 4, 4])], ids=["V-cycle", "growth"]
)
def test_the_recipes_of_vits_that_grow(name: str, layers: list[int]) -> None:
    recipe = PretrainRecipe.from_yaml(EXAMPLES / f"{name}.yaml")
    config = open_architecture(recipe)
    check_task(config, recipe)
    assert recipe.compare == "dense" and (recipe.task, recipe.data) == ("image", "fashion-mnist")
    assert [grown.model.config.num_hidden_layers for grown in stage_models(config, recipe)] == layers


def test_the_recipe_of_a_diffusion_model(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(image_features, "_STEPS", 5)
    for name, value in {"GRID": 4, "NUM": 8, "STEPS": 2}.items():
        monkeypatch.setattr(image_quality, name, value)
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path / "cache"))
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        (tmp_path / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "data" / "ab"[i % 2] / f"{i}.png")
    flags = ("--data", tmp_path / "data", "--set", "sample_size=8", "--output", tmp_path / "run")
    flags = (*flags, "--steps", 2, "--warmup-steps", 0, "--batch-size", 2, "--eval-tokens", 16)
    assert call("pretrain", "--recipe", EXAMPLES / "diffusion.yaml", *flags, "--dry-run").code == 0
    assert call("pretrain", "--recipe", EXAMPLES / "diffusion.yaml", *flags, "--set", "num_layers=1").code == 0
    grid = tmp_path / "grid.png"
    found = call("sample", tmp_path / "run", "--num", 3, "--steps", 2, "--class", "b", "--output", grid, "--json")
    assert found.code == 0 and json.loads(found.out)["class"] == "b"
    with Image.open(grid) as picture:
        assert picture.size[0] > 8
    for wrong, match in (
        (("--class", "c"), "Its classes: a, b"),
        (("--features", "other", "--quality"), "--features other is unknown"),
        (("--output", tmp_path / "grid.jpg"), "--output"),
    ):
        assert match in call("sample", tmp_path / "run", "--num", 2, "--steps", 2, *wrong).err
    assert not list((tmp_path / "here").iterdir())  # refused before anything is drawn
    llama = save_llama(tmp_path / "model")
    assert "samples are drawn from a diffusion model" in call("sample", llama, "--output", grid).err


def test_the_recipe_of_the_concepts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    recipe = Recipe.from_yaml(EXAMPLES / "concepts.yaml")
    (method,) = recipe.methods
    assert isinstance(method, ConceptBottleneck) and len(method.concepts) == 50 and len(method.classes) == 2
    assert (recipe.model, recipe.data, recipe.task, recipe.lora_r, recipe.deploy) == (
        "minilm", "movie-reviews", "classify", 0, "sparse",
    )  # fmt: skip
    assert len(read_concepts(EXAMPLES / "concepts" / "fashion.txt")) == len(all_attributes(CLOTHES))
