"""Compiled through AOT autograd, as inductor compiles: every parameter gets the gradient that it gets in eager mode."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import sparsetrain
from sparsetrain import PQAttention, RoutedFFN, TokenSelection
from tests.families import FAMILIES


@pytest.fixture(autouse=True)
def quiet_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():  # dynamo warns of what it leaves to eager
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [TokenSelection(), PQAttention.example(), RoutedFFN.example()], ids=lambda c: c.method
)
def test_gradients_and_auxiliary_gradients_survive_aot(config: Any) -> None:
    case, found = FAMILIES["llama"], []
    batch = case.batch(2, 40)
    batch["labels"] = batch["input_ids"].clone()
    more = {"num_items_in_batch": torch.tensor(120)}
    for compiled in (False, True):
        model = case.model()
        handle = sparsetrain.sparsify(model, config, calibration=[case.batch(4)])
        handle.step(0, 10)
        model.train()
        run: Any = torch.compile(model, backend="aot_eager") if compiled else model
        for rows in (slice(0, 1), slice(1, 2)):  # two micro-batches of one step
            run(**{n: x[rows] for n, x in batch.items()}, **more).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in found[0].items():
        assert (gradient is None) == (found[1][name] is None), name
        if gradient is not None:
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-6, msg=name)
