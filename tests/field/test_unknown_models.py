"""Models that nobody here has tried: a plan of what can be planned, or one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, BloomConfig, BloomForCausalLM, MixtralConfig

from sparsetrain.cli import run
from sparsetrain.hf.study.recipe_trace import outline
from sparsetrain.recipes.finetune import Recipe
from tests.cli.conftest import save_llama, write_text
from tests.families import llama_config

TYPES = ("mamba", "jamba", "qwen3_next", "gptj", "falcon_h1", "rwkv", "t5", "bart", "whisper", "llava", "qwen2_vl")
TYPES += ("clip", "vit", "dbrx", "deepseek_v3", "gpt_oss", "modernbert", "detr", "lfm2_moe")
DECODERS = ("mamba", "jamba", "qwen3_next", "gptj", "falcon_h1", "rwkv", "bart", "whisper", "dbrx", "deepseek_v3")
DECODERS += ("gpt_oss", "lfm2_moe")
"""Those whose dense training can be planned: see `tests/hf/test_outline.py`."""


def planned(folder: Path, values: dict[str, Any], capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    code = run(["plan", "--model", str(folder), "--seq-len", "32", "--batch-size", "1", *more])
    error = capsys.readouterr().err
    assert "Traceback" not in error and "report it" not in error, error
    return code, error


@pytest.mark.parametrize("kind", TYPES)
def test_families_without_a_row(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = CONFIG_MAPPING[kind]().to_dict() | {"model_type": kind}
    for more in (["--preset", "tokens"], *([] if kind in DECODERS else [["--memory", "24GB", "--preset", "dense"]])):
        code, error = planned(tmp_path / "model", values, capsys, *more, "--task", "lm")
        assert code == 2 and len(error.splitlines()) == 1 and len(error) < 1200, error


def test_dense_ways_of_a_family_without_a_row_are_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(BloomConfig(**sizes).to_dict()))
    words = ["plan", "--model", str(tmp_path), "--seq-len", "64", "--memory", "2GB", "--method", "token_selection"]
    assert run([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    known = {row["candidate"]["label"] for row in found["rows"] if row["peak"] is not None}
    assert known == {"LoRA", "LoRA + checkpointing", "all weights"} and found["picked"] == "LoRA"
    assert found["refused"]["token_selection"].startswith(
        "BloomForCausalLM: no block class is in the table of families"
    )
    assert "FFN" in found["refused"]["LoRA + tiled MLP"]


@pytest.mark.parametrize("lora_r", [0, 8])
def test_a_mixture_of_experts_in_fp32(lora_r: int) -> None:
    """The meta kernel of products by groups knows bf16 alone; the plan is that of bf16 at twice the bytes."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 300}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    recipe = Recipe.from_values({"model": "m", "data": "d", "methods": [], "lora_r": lora_r, "seq_len": 64})
    full, half = (outline(recipe, MixtralConfig(**sizes), bf16=bf16, lengths=(64,)) for bf16 in (False, True))
    assert full.parameters == half.parameters and full.trained == half.trained
    products = sum(numbers[0] for kind, numbers in full.work(64).items() if kind.startswith("gemm"))
    in_bf16 = sum(numbers[0] for kind, numbers in half.work(64).items() if kind.startswith("gemm"))
    assert products == pytest.approx(in_bf16, rel=0.01)
    experts = 2 * 2 * (3 * 64 * 128) * 64 * 2  # forward: 2 FLOPs, 2 experts a token, 3 matrices, 64 tokens, 2 layers
    assert products > 2 * experts


@pytest.mark.parametrize(
    "dtype", ["float7", "bfloat16", "torch.bfloat16", "auto", "", 5, 1.5, True, None, [], {"a": "b"}, "x" * 5000]
)
def test_odd_dtypes_of_a_config(dtype: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("dtype", "torch_dtype"):
        values = llama_config(num_hidden_layers=1).to_dict() | {key: dtype}
        code, error = planned(tmp_path / "model", values, capsys, "--method", "token_selection")
        assert code in (0, 2) and len(error) < 1200, error
        if dtype in (None, "bfloat16"):
            assert code == 0, error


WRONG = {
    "num_hidden_layers": [10**6, -1, "2", 1.5],
    "hidden_size": [0, "64", 10**12],
    "vocab_size": [10**12],
    "num_attention_heads": [0, 7],
    "model_type": [5, "no-such"],
    "hidden_act": ["x"],
    "rope_parameters": [5],
    "rope_scaling": [{"type": "x"}],
    "max_position_embeddings": [-5],
    "architectures": [5],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_values_that_no_model_has(key: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = llama_config(num_hidden_layers=1).to_dict() | {key: value}
    for more in (["--method", "token_selection"], ["--memory", "24GB", "--preset", "dense"]):
        code, error = planned(tmp_path / "model", values, capsys, *more)
        assert code == 2 and len(error) < 1200, error


def test_dense_training_needs_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With attention of the family's own, the loss in chunks, and an adapter that has the run's quality."""
    folder = save_llama(tmp_path / "model")
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    BloomForCausalLM(BloomConfig(vocab_size=300, **sizes)).save_pretrained(folder)
    text, output = str(write_text(tmp_path / "text.txt", 6000)), str(tmp_path / "run")
    short = ["--preset", "dense", "--seq-len", "64", "--steps", "2", "--device", "cpu", "--dtype", "fp32", "--json"]
    assert run(["finetune", "--model", str(folder), "--data", text, "--output", output, *short]) == 0
    trained = json.loads(capsys.readouterr().out)["run"]
    assert trained["saved_activation_bytes"]
    assert run(["eval", output, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["perplexity"] == pytest.approx(trained["perplexity"]["after_training"], rel=1e-5)
