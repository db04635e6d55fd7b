"""An exported model as GGUF: llama.cpp's script converts it, and what the file holds is the model.

The script is in no installed package: CONVERT_HF_TO_GGUF names it (docs/export.md says where it is).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsetrain.hf.assets import asset_status
from tests.cli.conftest import Call

SCRIPT = os.environ.get("CONVERT_HF_TO_GGUF", "")


@pytest.mark.slow
@pytest.mark.assets
@pytest.mark.skipif(not Path(SCRIPT).is_file(), reason="CONVERT_HF_TO_GGUF names no script of llama.cpp")
def test_what_is_exported_is_the_same_model_as_gguf(call: Call, tmp_path: Path) -> None:
    if asset_status("smollm2-135m").state != "ready":
        pytest.skip("smollm2-135m is not there")
    rows = [{"prompt": f"What is {i} plus 1?", "completion": f"It is {i + 1}."} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run, folder, file = tmp_path / "run", tmp_path / "model", tmp_path / "model.gguf"
    asked = ["--data", tmp_path / "rows.jsonl", "--task", "sft", "--preset", "dense", "--steps", 1, "--seq-len", 64]
    assert call("finetune", "--model", "smollm2-135m", *asked, "--dtype", "fp32", "--output", run).code == 0
    assert call("export", run, "--output", folder).code == 0
    subprocess.run([sys.executable, SCRIPT, folder, "--outfile", file, "--outtype", "f32"], check=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("def add(a, b):\n    return", return_tensors="pt").input_ids
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, read(ids).logits)
    llama_cpp = pytest.importorskip("llama_cpp", reason="read by transformers alone: llama-cpp-python is not installed")
    llama = llama_cpp.Llama(str(file), n_ctx=64, logits_all=True, verbose=False)
    assert llama.tokenize(b"def add(a, b):\n    return", add_bos=False) == ids[0].tolist()
    llama.eval(ids[0].tolist())
    theirs = torch.tensor(llama.scores[: ids.shape[1]])
    with torch.no_grad():
        torch.testing.assert_close(theirs, ours(ids).logits[0], atol=0.05, rtol=0.01)
        assert (theirs.argmax(1) == ours(ids).logits[0].argmax(1)).all()
