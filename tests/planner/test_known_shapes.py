"""What is remembered of an operation is what the fake mode says; traces are equal with and without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import GPT2Config

from sparsetrain.hf.study.recipe_trace import outline
from sparsetrain.planner.hollow import Hollow
from sparsetrain.planner.known_shapes import KnownShapes
from sparsetrain.recipes.finetune import Recipe

WAYS: list[dict[str, Any]] = [
    {"tiled_mlp": 4, "gradient_checkpointing": "non-reentrant"},
    {"tiled_mlp": 4},
    {"lora_r": 0},
    {"methods": [{"method": "token_selection"}]},
]


def traced(way: dict[str, Any]) -> str:
    """On a GPT-2, which has dropout."""
    recipe = Recipe.from_values({"data": "none", "model": "m", "methods": [], "lora_r": 4, **way})
    config = GPT2Config(n_layer=3, n_embd=64, n_head=4, vocab_size=300)
    return outline(recipe, config, bf16=True, gpu=True).to_json()


@pytest.mark.parametrize("way", WAYS)
def test_a_trace_is_the_same_with_what_is_known(way: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cold, warm = traced(way), traced(way)
    monkeypatch.setattr(KnownShapes, "get", lambda *_: None)
    assert cold == warm == traced(way)


def test_pytorch_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    ask = Hollow._asked
    monkeypatch.setattr(Hollow, "_asked", lambda self, func, *rest: asked.append(func) or ask(self, func, *rest))
    with Hollow() as hollow:
        hollow.known = KnownShapes()
        for _ in range(3):
            x = torch.empty(2, 8, dtype=torch.bfloat16)
            y = (x @ torch.empty(8, 4, dtype=torch.bfloat16)).float()
            y.mul_(2.0)
    made = [func for func in asked if func is not torch.ops.prim.device.default]
    assert len(made) == len(set(made)) + 1, "two shapes of `empty`, and everything else once"
    assert (y.shape, y.dtype) == ((2, 4), torch.float32)


def test_strides_and_types_of_numbers_count() -> None:
    with Hollow():
        x = torch.empty(3, 5)
        for _ in range(2):
            assert (x + 1).stride() == (5, 1) and (x.t() + 1).stride() == (1, 5)
            assert torch.full((2,), 1.0).dtype == torch.float32
            assert torch.full((2,), 1).tolist() == [1, 1] and torch.full((2,), True).tolist() == [True, True]


def test_new_tensors_have_their_own_storage_and_views_do_not() -> None:
    with Hollow():
        x = torch.empty(4, 6)
        first, second = x + x, x + x
        assert first.untyped_storage()._cdata != second.untyped_storage()._cdata
        for _ in range(2):
            assert x.view(6, 4).untyped_storage()._cdata == x.untyped_storage()._cdata
            assert x.add_(1.0) is x and x[1:].mul_(2.0).shape == (3, 6)


def test_integers_are_written_each_time() -> None:
    with Hollow():
        counts = torch.zeros(3, dtype=torch.int64)
        for _ in range(3):
            counts.add_(1)
        assert counts.tolist() == [3, 3, 3]


def test_a_mask_too_large_for_values_has_none() -> None:
    with Hollow():
        i = torch.arange(4096)
        distance = i[:, None] - i[None]
        assert distance.shape == (4096, 4096) and isinstance(distance, FakeTensor)
        assert (i + i[:1]).tolist()[:3] == [0, 1, 2], "a result that is small has its values"
