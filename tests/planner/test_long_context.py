"""Very long rows with few targets: what a plan proves by component."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from sparsetrain.hf.model.model_config import read_config
from sparsetrain.hf.study.recipe_trace import outline
from sparsetrain.ops.selected_rows import all_rows
from sparsetrain.planner.memory import PeakBytes
from sparsetrain.recipes.finetune import Recipe

KEYS_AND_VALUES = 32 * 2 * 1024 * 2
"""Bytes a token of Llama-3-8B's blocks in bf16."""


def recipe_of(four_bit: bool = False, **config: Any) -> Recipe:
    chosen = {"method": "token_selection", "keep_ratio": 0.02, "pool": "targets", "recompute": True, **config}
    values = {"data": "none", "model": "llama-3-8b", "methods": [chosen], "load_in_4bit": four_bit}
    return Recipe.from_values(values)


def peak_of(tokens: int, **asked: Any) -> PeakBytes:
    config = AutoConfig.for_model(**read_config("llama-3-8b").values)
    return outline(recipe_of(**asked), config, bf16=True, gpu=True, lengths=(tokens,)).peak(tokens)


@pytest.mark.slow  # each traces three blocks of 8B, some three seconds on a free processor
@pytest.mark.parametrize(
    ("gigabytes", "tokens", "asked"),
    [
        (80, 2**18, {}),
        (80, 2**19, {"offload": True}),
        (48, 2**17, {}),
        (24, 2**15, {"four_bit": True}),
    ],
)
def test_llama_3_8b_fits_one_card(gigabytes: int, tokens: int, asked: dict[str, Any]) -> None:
    peak = peak_of(tokens, **asked)
    held = sum(peak.saved.values())
    keys = tokens * KEYS_AND_VALUES
    assert peak.total < 0.95e9 * gigabytes
    if "offload" in asked:
        assert peak.host == keys and held < 0.1 * keys
    else:
        assert peak.host == 0 and keys <= held < 1.1 * keys
    # times the stream of a block: nothing as wide as the FFN; beside 4-bit linears LoRA's update is PEFT's, in fp32
    assert peak.temporary < (14 if "four_bit" in asked else 8) * tokens * 4096 * 2


def test_a_plan_for_a_gpu_is_the_same_on_every_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model(**read_config("smollm2-135m").values)
    found = []
    for units in ((False, False), (True, False), (True, True)):
        monkeypatch.setattr(all_rows, "_units", lambda units=units: units)
        made = outline(recipe_of(), config, bf16=True, gpu=True, lengths=(512,))
        found.append(made.peak(512))
    assert found[0] == found[1] == found[2]
