"""A run that deploys dense leaves a plain adapter, and what it says of its quality is said of the plain model."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from sparsetrain.hf.data import load_text
from sparsetrain.hf.model.io import export, load, sidecar_of
from sparsetrain.hf.train.evaluate import evaluate
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.runs.result import Result
from sparsetrain.runs.sidecar import read_state
from tests.hf.runs import CLUSTERED, CONTEXT, HIDDEN, PQ, WORDS, llama, recipe, text, tokenizer

TOKENS = {"method": "token_selection", "keep_ratio": 0.4}
METHODS = [CLUSTERED, PQ, TOKENS]


def perplexity(result: Result) -> dict[str, Any]:
    found: Any = result.run
    return found["perplexity"]


def trained(folder: Path, **changes: Any) -> Result:
    return finetune(recipe(folder, **{"deploy": "dense", "steps": 10, "methods": METHODS, **changes}))


def gpt2(folder: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": len(WORDS) + 4, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=CONTEXT, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def held_out_loss(model: Any, folder: Path) -> float:
    """Of a loaded model, on the rows that the run held out."""
    asked = recipe(folder)
    rows = load_text(asked.data, tokenizer(), asked.seq_len, max_tokens=10**6, max_eval_tokens=asked.eval_tokens)
    assert rows.eval is not None
    return evaluate(model, rows.eval, rows.collate_fn, task="lm", batch_size=2, max_tokens=asked.eval_tokens).loss


def plain(folder: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), folder / "out" / "adapter")


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2"])
def test_the_run_s_quality_is_that_of_the_plain_model(kind: str, tmp_path: Path) -> None:
    if kind == "gpt2":
        gpt2(tmp_path / "model")
    else:
        llama(tmp_path / "model", tie_word_embeddings=kind == "tied")
    text(tmp_path / "text")
    result = trained(tmp_path)
    said = math.log(perplexity(result)["after_training"])
    assert set(perplexity(result)) == {"dense", "after_training"}
    model = plain(tmp_path).eval()
    assert held_out_loss(model, tmp_path) == pytest.approx(said, rel=1e-5)
    assert held_out_loss(load(tmp_path / "out").model, tmp_path) == pytest.approx(said, rel=1e-5)
    export(tmp_path / "out", tmp_path / "merged")
    assert sidecar_of(tmp_path / "merged")["configs"] == []
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert held_out_loss(merged.eval(), tmp_path) == pytest.approx(said, rel=1e-5)
    names = set(load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors"))
    assert names and all("lora_" in name for name in names)


def test_a_curve_s_points_are_of_the_plain_model_with_the_adapter_of_that_moment(tmp_path: Path) -> None:
    """Two runs at equal time are compared by such points, in the midst of the sparse phase."""
    result = trained(tmp_path, save_every=5, eval_every=5)
    point = result.run["evals"][1]  # type: ignore[typeddict-item]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    then = PeftModel.from_pretrained(base, tmp_path / "out" / "checkpoint-5").eval()
    assert point["step"] == 5 and held_out_loss(then, tmp_path) == pytest.approx(point["loss"], rel=1e-5)
    assert point["loss"] != pytest.approx(result.run["evals"][2]["loss"], rel=1e-3)  # type: ignore[typeddict-item]


STRANGER = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
asked = json.load(sys.stdin)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "run/adapter").eval()
total = targets = 0
with torch.no_grad():
    for batch in asked:
        batch = {name: torch.tensor(values) for name, values in batch.items()}
        count = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * count
        targets += count
said = json.load(open("run/result.json"))["run"]["evals"][-1]["loss"]
assert not any(name.startswith("sparsetrain") for name in sys.modules)
print(json.dumps([total / targets, said]))
"""


def test_elsewhere_a_stranger_s_peft_has_the_loss_that_the_run_recorded(tmp_path: Path) -> None:
    """Base and run are moved, so that no path of the run is there any more. Slow for its own process, which is the
    point of it: it imports torch, PEFT and transformers."""
    result = trained(tmp_path)
    asked = recipe(tmp_path)
    rows = load_text(asked.data, tokenizer(), asked.seq_len, max_tokens=10**6, max_eval_tokens=asked.eval_tokens).eval
    assert rows is not None
    batches = [{name: [row[name]] for name in ("input_ids", "labels")} for row in rows]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model").rename(tmp_path / "elsewhere" / "base")
    (tmp_path / "out").rename(tmp_path / "elsewhere" / "run")
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STRANGER], input=json.dumps(batches), capture_output=True, text=True,
        cwd=tmp_path / "elsewhere", env=outside,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, said = json.loads(done.stdout.splitlines()[-1])
    assert said == result.run["evals"][-1]["loss"]  # type: ignore[typeddict-item]
    assert found == pytest.approx(said, rel=1e-5)
    assert abs(said - result.run["evals"][0]["loss"]) > 1e-3  # type: ignore[typeddict-item]


def test_resumed_in_the_dense_finish_it_ends_the_same(tmp_path: Path) -> None:
    whole = trained(tmp_path, save_every=9, dense_last=0.3)
    before = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    for name in ("result.json", "report.json", "report.html"):
        (tmp_path / "out" / name).unlink()
    shutil.rmtree(tmp_path / "out" / "adapter")
    for late in (tmp_path / "out").glob("checkpoint-10"):
        shutil.rmtree(late)
    again = trained(tmp_path, save_every=9, dense_last=0.3, resume=True)
    assert again.resumed_from == 9
    after = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert perplexity(again)["after_training"] == perplexity(whole)["after_training"]


def test_what_was_added_stays_as_it_was_fitted(tmp_path: Path) -> None:
    trained(tmp_path, save_every=5)
    early, late = (read_state(tmp_path / "out" / f"checkpoint-{step}") for step in (5, 10))
    assert early.keys() == late.keys() and early
    for site, tensors in early.items():
        for name, value in tensors.items():
            assert torch.equal(value, late[site][name]), (site, name)


def test_all_weights_trained_to_the_end_are_evaluated_and_saved_on_resume(tmp_path: Path) -> None:
    whole = trained(tmp_path, lora_r=0, lr=1e-3, save_every=10)
    for name in ("result.json", "report.json", "report.html"):
        (tmp_path / "out" / name).unlink()
    run = tmp_path / "out" / "run.json"
    run.write_text(json.dumps({key: value for key, value in json.loads(run.read_text()).items() if key != "finished"}))
    shutil.rmtree(tmp_path / "out" / "model")
    again = trained(tmp_path, lora_r=0, lr=1e-3, save_every=10, resume=True)
    assert again.resumed_from == 10 and perplexity(again) == perplexity(whole)


def test_all_weights_are_saved_plain(tmp_path: Path) -> None:
    result = trained(tmp_path, lora_r=0, lr=1e-3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").eval()
    said = math.log(perplexity(result)["after_training"])
    assert held_out_loss(model, tmp_path) == pytest.approx(said, rel=1e-5)
    assert not any("router" in name for name in load_file(tmp_path / "out" / "model" / "model.safetensors"))
