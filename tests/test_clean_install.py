"""Neither a compiler nor Triton: conversion, a step, saving and reading work all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import shutil, sys
sys.modules["triton"] = None  # importing it is an ImportError
assert not any(shutil.which(name) for name in ("cc", "gcc", "g++", "c++", "clang", "clang++", "cl"))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparsetrain
from sparsetrain.core.backend import has_triton
from sparsetrain.hf.model.io import load, save

assert not has_triton()
shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, pad_token_id=0, **shape))
handle = sparsetrain.sparsify(
    model,
    sparsetrain.PQAttention(num_keys=24, block_q=8, block_k=8, local_tokens=4, codebook_init="normal", warmup_ratio=0),
    sparsetrain.RoutedFFN(num_blocks=4, num_active=2),
    sparsetrain.TokenSelection(keep_ratio=0.5),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
ids = torch.randint(1, 64, (2, 64))
before = [p.detach().clone() for p in model.parameters()]
loss = model.train()(input_ids=ids, labels=ids).loss
loss.backward()
optimizer.step()
handle.step(1)
assert loss.isfinite() and any(not torch.equal(p, q) for p, q in zip(before, model.parameters()))
handle.settle()
with torch.no_grad():
    expected = model.eval()(input_ids=ids).logits
save(model, handle, sys.argv[1])
read = load(sys.argv[1])
with torch.no_grad():
    torch.testing.assert_close(read.model.eval()(input_ids=ids).logits, expected)
"""


def test_it_trains_without_compiler_and_triton(tmp_path: Path) -> None:
    """Slow by its process, which imports torch and transformers anew."""
    (tmp_path / "bin").mkdir()
    clean = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "TRITON_INTERPRET")}
    clean |= {"PATH": str(tmp_path / "bin"), "OMP_NUM_THREADS": "1"}
    asked = [sys.executable, "-W", "error::RuntimeWarning", "-c", SCRIPT, str(tmp_path / "saved")]
    result = subprocess.run(asked, env=clean, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
