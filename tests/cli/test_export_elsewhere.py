"""docs/export.md: what is exported loads in plain transformers, with the trained model's outputs."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsetrain.hf.model.io import load
from tests.cli.conftest import Call, save_llama, write_text


def test_an_export_is_a_plain_model(call: Call, tmp_path: Path) -> None:
    flags = ("--seq-len", 64, "--steps", 2, "--lr", "0.01", "--eval-tokens", 64, "--dtype", "fp32", "--preset", "dense")
    text = write_text(tmp_path / "text.txt", 2000)
    run = tmp_path / "run"
    base = save_llama(tmp_path / "llama")
    assert call("finetune", "--model", base, "--data", text, "--output", run, *flags).code == 0
    assert call("export", run, "--output", tmp_path / "my-model", "--format", "dense").code == 0
    assert not list((tmp_path / "my-model").glob("*sparsity*"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "my-model")
    ids = AutoTokenizer.from_pretrained(tmp_path / "my-model")("def return x", return_tensors="pt")
    with torch.no_grad():
        there, here = plain(**ids).logits, load(run).model(**ids).logits
        before = AutoModelForCausalLM.from_pretrained(base)(**ids).logits
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)
    assert (there - before).abs().max() > 1e-3
