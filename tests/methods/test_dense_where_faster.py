"""Sparse attentions run dense where dense attention was faster on this machine, and say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparsetrain
from sparsetrain import FloodFillAttention, PQAttention
from sparsetrain.core.config import MethodConfig
from sparsetrain.methods.flood_fill_attention import module as flood_fill
from sparsetrain.methods.pq_attention import module as pq
from sparsetrain.surgery import attention
from tests.families import FAMILIES

SHAPES = "2 x 64 tokens: dense 1 ms, flex 2 ms"
METHODS = [(PQAttention.example(), pq), (FloodFillAttention(block_tokens=8, filter_edge=5), flood_fill)]


@pytest.mark.parametrize(("config", "module"), METHODS, ids=["pq", "flood_fill"])
def test_the_output_is_the_dense_models_and_one_line_says_why(
    config: MethodConfig, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = FAMILIES["llama"]
    model, batch = case.model(), case.batch(2, 64)
    dense = model(**batch).logits
    handle = sparsetrain.sparsify(model, config, calibration=[case.batch(2)])
    model.train()
    for site in handle.sites(config.method).values():
        site.set_step(1, 1)
        if isinstance(config, FloodFillAttention):
            site.mask = torch.eye(8, dtype=torch.bool)[None]  # type: ignore[assignment]
    sparse = model(**batch).logits
    assert (sparse - dense).abs().max() > 1e-3
    asked = []

    def faster(q: Any, k: Any, **shape: Any) -> str:
        asked.append(shape)
        return SHAPES

    monkeypatch.setattr(module, "dense_is_faster", faster)
    attention.say_dense.cache_clear()
    with pytest.warns(UserWarning, match=f"{type(config).__name__} attends densely .* {SHAPES}") as said:
        found = model(**batch).logits
    assert len(said) == 1 and len(asked) > 1
    assert all(shape["causal"] and 1 <= shape["num_slots"] <= 8 and shape["block_q"] == 8 for shape in asked)
    torch.testing.assert_close(found, dense)
