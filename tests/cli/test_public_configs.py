"""`plan` on configs of public models (`public_configs/`, JSON from what is published): an answer, or what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsetrain.hf.model.model_config import built_in_configs, read_config
from sparsetrain.hf.study.predict import predictor_of
from sparsetrain.planner.candidates import candidates
from sparsetrain.planner.machines import known_machines
from sparsetrain.planner.predictor import predict
from sparsetrain.planner.search import Question
from tests.cli.conftest import Call

CONFIGS = Path(__file__).parent / "public_configs"
BILLIONS = {"falcon-h1-7b": 7.59, "gemma-2-9b": 9.24, "gemma-3-4b-it": 4.30,
            "gpt-oss-20b": 20.91, "gpt2-xl": 1.56, "llama-3.2-3b": 3.21,
            "mistral-nemo-12b": 12.25, "mixtral-8x7b": 46.7, "olmo-2-7b": 7.30, "olmoe-1b-7b": 6.92, "opt-6.7b": 6.66,
            "phi-3-mini": 3.82, "qwen2.5-14b": 14.77, "qwen3-30b-a3b": 30.53, "qwen3-8b": 8.19, "roberta-large": 0.355,
            "smollm2-1.7b": 1.71}  # fmt: skip
"""Parameters that are published. What `plan` answers."""
TOO_LARGE = {"deepseek-v3": 671.0, "qwen3-next-80b-a3b": 79.7}
"""Planned, and more than the GPU that is asked about holds."""
REFUSED = {"jamba-1.5-mini": "what it keeps is not known"}
REFUSED |= dict.fromkeys(("llava-1.5-7b", "qwen2.5-vl-7b"), "cannot be loaded as AutoModelForCausalLM. Name a model")
QUICK = ("llama-3.2-3b", "qwen3-30b-a3b", "gemma-3-4b-it", "opt-6.7b")
"""One of a kind: dense, mixture of experts, vision-language with layers of two kinds, an older decoder."""


def quick(names: dict[str, object]) -> list[object]:
    """The others are alike, and a second each."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


def test_each_config_has_its_verdict_and_there_are_twenty() -> None:
    names = {path.stem for path in CONFIGS.glob("*.json")}
    assert names == BILLIONS.keys() | TOO_LARGE.keys() | REFUSED.keys() and len(names) >= 20
    assert not names & built_in_configs().keys()


@pytest.mark.parametrize("name", quick(BILLIONS | TOO_LARGE))
def test_an_answer(name: str) -> None:
    machine = known_machines()["h200"]
    planner = predictor_of(read_config(str(CONFIGS / f"{name}.json")), {"lora_r": 1}, bf16=True, cache=None, gpu=True)
    (way,) = (c for c in candidates(planner.base, gpu=True) if c.label == "LoRA + checkpointing")
    tokens = min(4096, planner.model.context or 4096)
    question = Question(tokens=tokens, memory_bytes=machine.memory_bytes, dtype="bf16", rates=machine)
    found = predict(planner, question, [way])
    (row,) = found.rows
    assert row.peak is not None and row.fits == (name in BILLIONS), row.refused
    assert row.peak.parameters / 2e9 == pytest.approx((BILLIONS | TOO_LARGE)[name], rel=0.01)
    if name in ("mixtral-8x7b", "qwen3-30b-a3b", "olmoe-1b-7b"):
        (tiled,) = (c for c in candidates(planner.base, gpu=True) if c.label == "LoRA + tiled MLP")
        with pytest.raises(ValueError, match="mixture of experts"):
            planner.outline(tiled)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_that_says_what_to_do(name: str) -> None:
    planner = predictor_of(read_config(str(CONFIGS / f"{name}.json")), {"lora_r": 16}, bf16=True, cache=None, gpu=True)
    with pytest.raises(ValueError, match=REFUSED[name]):
        planner.outline(candidates(planner.base)[0])


@pytest.mark.slow  # every way to train each of them, some twenty seconds of a core
@pytest.mark.parametrize("name", [*BILLIONS, *TOO_LARGE, *REFUSED])
def test_the_command_ends_with_an_answer_or_a_line(
    name: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSETRAIN_CACHE", str(tmp_path))
    told = call("plan", "--model", CONFIGS / f"{name}.json", "--gpu", "h200", "--seq-len", 1024)
    assert "Traceback" not in told.err
    assert (told.code == 2 and REFUSED[name].split(".")[0] in told.err) if name in REFUSED else told.code in (0, 1)
    assert json.loads((CONFIGS / f"{name}.json").read_text())["_name_or_path"]
