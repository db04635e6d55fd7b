"""Methods of another package, loaded by entry point, go through the contract like ours, and need nothing above."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROBES = sorted(path for path in (HERE / "sparsetrain_probes").glob("*.py") if path.name != "__init__.py")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where the probes are installed: their folder holds the package and its metadata."""
    places = [str(HERE), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)


def test_there_are_five_of_at_most_eighty_lines() -> None:
    assert len(PROBES) == 5
    for path in PROBES:
        assert len(path.read_text().splitlines()) <= 80, path.name


def test_they_are_known_wherever_ours_are() -> None:
    code = (
        "from sparsetrain.core.config import registered_methods\n"
        "import sparsetrain.methods\n"
        "from sparsetrain.recipes.pretrain import PretrainRecipe\n"
        "recipe = PretrainRecipe.from_values({'model': 'gpt2-nano', 'data': 'd', 'methods': ['toy_low_rank:rank=4']})\n"
        "print([name for name in registered_methods() if name.startswith('toy_')], recipe.configs[0].rank)"
    )
    out = python("-c", code)
    assert out.returncode == 0, out.stderr
    for name in ("toy_concepts", "toy_convolution_mask", "toy_entries", "toy_low_rank", "toy_widening"):
        assert name in out.stdout
    assert out.stdout.strip().endswith(" 4")


def test_a_broken_package_is_named_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "broken-1.dist-info").mkdir()
    (tmp_path / "broken-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (tmp_path / "broken-1.dist-info" / "entry_points.txt").write_text("[sparsetrain.methods]\nbad = not_there_at_all\n")
    code = "import sparsetrain; print(sparsetrain.RoutedFFN.method)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert out.stdout.strip() == "routed_ffn"
    assert "entry point bad (not_there_at_all) cannot be loaded" in out.stderr


@pytest.mark.parametrize("families", ["llama or unet2d", "gpt2 or bert", "vit or opt"])
def test_they_keep_the_contract(families: str) -> None:
    """Takes some twenty seconds a group: the contract runs in a process of its own, which has the probes installed."""
    out = python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/methods/test_contract.py", "-m", "not slow and not gpu",
        "-k", f"toy_ and ({families})",
    )  # fmt: skip
    assert out.returncode == 0, out.stdout[-6000:]


def test_only_chosen_entries_move_under_adamw_with_decay() -> None:
    code = (
        "import torch, sparsetrain\n"
        "from sparsetrain.core.config import MethodConfig\n"
        "from tests.families import FAMILIES\n"
        "case = FAMILIES['llama']; model = case.model()\n"
        "handle = sparsetrain.sparsify(model, MethodConfig.from_dict({'method': 'toy_entries'}))\n"
        "before = {n: p.clone() for n, p in model.named_parameters()}\n"
        "optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)\n"
        "model(**case.batch()).logits.square().mean().backward(); optimizer.step()\n"
        "site = handle.sites('toy_entries')['model.layers.0.mlp.up_proj']\n"
        "old = before['model.layers.0.mlp.up_proj.weight'].flatten()\n"
        "assert torch.equal(model.model.layers[0].mlp.up_proj.weight.flatten(), old)\n"
        "assert (site.values != old[site.places]).all()\n"
    )
    out = python("-c", code)
    assert out.returncode == 0, out.stderr[-3000:]


def test_a_run_trains_the_chosen_values_alone_and_saves_them_written_in(tmp_path: Path) -> None:
    code = f"""
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from sparsetrain.hf.model.io import load
from sparsetrain.hf.train.finetune import finetune
from tests.hf import runs
recipe = runs.recipe(Path({str(tmp_path)!r}), methods=["toy_entries:ratio=0.1"], lora_r=None)
assert recipe.lora_r == 0 and not recipe.trains_all
result = finetune(recipe, write=False)
perplexity = result.run["perplexity"]
assert perplexity["after_training"] < perplexity["dense"], perplexity
assert result.trainable_parameters == sum(row["added_params"] for row in result.plan) > 0
optimizer = result.run["static_bytes"]["optimizer_trainable"]
assert optimizer < 9 * result.trainable_parameters + 1000, optimizer
batch = dict(input_ids=torch.arange(4, 20)[None])
loaded, plain = load(recipe.output), AutoModelForCausalLM.from_pretrained(result.saved)
assert loaded.handle.sites("toy_entries")
torch.testing.assert_close(loaded.model(**batch).logits, plain.eval()(**batch).logits)
dense = AutoModelForCausalLM.from_pretrained(Path({str(tmp_path)!r}) / "model")
assert not torch.allclose(dense(**batch).logits, plain(**batch).logits)
"""
    out = python("-c", code)
    assert out.returncode == 0, out.stderr[-3000:]
