"""What a launcher's config file says of precision changes no recipe."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from sparsetrain.hf.train.on_ranks import on_ranks


@pytest.mark.parametrize("said", ["no", "bf16"])
def test_the_recipe_alone_says_what_is_trained(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", said)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    told: list[dict[str, Any]] = []

    @on_ranks
    def train(recipe: Any, *, report: Any) -> None:
        assert "ACCELERATE_MIXED_PRECISION" not in os.environ and "ACCELERATE_DYNAMO_BACKEND" not in os.environ

    train(SimpleNamespace(device="cpu"), report=told.append)
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == said
    assert [event["text"] for event in told] == (
        [] if said == "no" else ["ACCELERATE_MIXED_PRECISION=bf16 is passed over: the recipe says dtype."]
    )
