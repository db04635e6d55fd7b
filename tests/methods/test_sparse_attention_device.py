"""Sparse attention on padded rows and beside dense ones: what the host is asked in a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from sparsetrain import PQAttention, sparsify
from sparsetrain.core.found_once import found_once
from tests.families import llama_config
from tests.methods.test_token_selection_device import batch_of, step

SMALL = {"num_keys": 16, "local_tokens": 4, "block_q": 8, "block_k": 8, "warmup_ratio": 0.0, "codebook_init": "normal"}


def reads_of_a_layer(padded: bool, **config: Any) -> float:
    """Beside what one asks once a step. A CPU's way of attending reads its lists itself."""
    found = []
    for layers in (1, 4):
        torch.manual_seed(0)
        model = LlamaForCausalLM(llama_config(num_hidden_layers=layers)).train()
        model.config.use_cache = False
        sparsify(model, PQAttention(**{**SMALL, **config}))
        batch = batch_of(padded)
        batch["labels"][:, :30] = -100
        found.append(sum(step(model, batch).reads.values()))
    return (found[1] - found[0]) / 3


@pytest.mark.parametrize("granularity", ["block", "token"])
def test_padding_is_looked_at_once_a_step(granularity: str) -> None:
    """It asked the host four times in every layer: a GPU waits for it."""
    plain, padded = (reads_of_a_layer(p, granularity=granularity) for p in (False, True))
    assert padded == plain


def test_dense_rows_are_looked_at_once_a_step() -> None:
    plain, dense = (reads_of_a_layer(True, dense_tokens=way) for way in ("none", "targets"))
    assert dense == plain


def test_what_was_found_of_a_tensor_is_found_anew_once_it_was_written_to() -> None:
    x, asked = torch.zeros(3), []

    def most() -> float:
        asked.append(x)
        return float(x.max())

    assert [found_once(x, "most", most) for _ in range(2)] == [0.0, 0.0] and len(asked) == 1
    x[1] = 2.0
    assert found_once(x, "most", most) == 2.0 and len(asked) == 2
    assert found_once(x, ("most", 2), lambda: 5.0) == 5.0 and found_once(x.clone(), "most", lambda: 7.0) == 7.0
