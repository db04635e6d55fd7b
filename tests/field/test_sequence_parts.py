"""Which methods look across positions: with those that do not, a sequence may be cut, as context parallelism does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import sparsetrain
from sparsetrain.core.config import registered_methods
from tests.families import FAMILIES

BY_POSITION = ("routed_ffn", "semi_structured", "pst", "monarch", "sara")


@pytest.mark.parametrize("method", BY_POSITION)
def test_a_sequence_in_parts_is_the_whole_one(method: str) -> None:
    model: Any = FAMILIES["llama"].model().double()
    config = registered_methods()[method].example()
    sparsetrain.sparsify(model, config, calibration=[FAMILIES["llama"].batch(4, 48, seed=5)], seed=0)
    model.double().train()  # as it is trained: in evaluation most are dense
    ids = FAMILIES["llama"].batch(2, 40, seed=1)["input_ids"]
    cache = DynamicCache()
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        parts = [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in ids.split(24, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-6, atol=1e-6)
