"""What a handle says about who ran the methods' operations."""

from __future__ import annotations

from typing import Any

import pytest

import sparsetrain
from sparsetrain import FloodFillAttention, PQAttention, RoutedFFN, TokenSelection
from sparsetrain.core.backend import choose, use_backend, watch_ops
from tests.families import FAMILIES


def test_watches_inside_watches() -> None:
    ours: dict[str, set[str]] = {"op": {"triton"}}
    with watch_ops() as outer:
        with watch_ops(ours), use_backend("reference"):
            choose("op", "auto", {"torch": None, "reference": None})
        choose("another", "auto", {"torch": None})
    assert ours == {"op": {"triton", "reference"}}
    assert outer == {"op": {"triton", "reference"}, "another": {"torch"}}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            TokenSelection(keep_ratio=0.5),
            "token_selection: ran selected attention on torch, selected loss on torch.",
        ),
        (
            TokenSelection(keep_ratio=0.5, recompute=True),
            "token_selection: ran selected attention on torch, selected loss on torch.",
        ),
        (RoutedFFN.example(), "routed_ffn: ran routed ffn on torch."),
        (
            PQAttention.example(),
            "pq_attention: ran block sparse attention on torch, product quantization on torch.",
        ),
        (FloodFillAttention.example(), "flood_fill_attention: ran block sparse attention on torch."),
    ],
    ids=["tokens", "recompute", "routed_ffn", "pq_attention", "flood_fill"],
)
def test_the_report_names_the_backends_that_ran(config: Any, said: str) -> None:
    case = FAMILIES["llama"]
    model, batch = case.model(), case.batch()
    handle = sparsetrain.sparsify(model, config, calibration=[case.batch(4)])
    model.train()
    handle.settle()
    assert not any(": ran " in note for note in handle.notes())
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert [note for note in handle.notes() if ": ran " in note] == [said]
    assert said in handle.report()["notes"]
