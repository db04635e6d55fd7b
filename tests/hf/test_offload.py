"""Checkpointed inputs on the host. There is no device here whose memory could be counted, so what transformers would
copy off one is taken out of torch's hands: into numpy arrays."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import transformers.modeling_utils
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sparsetrain.hf.model.checkpointing import recompute
from sparsetrain.hf.study.recipe_trace import example_batch, outline, training_step
from sparsetrain.measure.memory import saved_activations
from sparsetrain.planner.step_tracer import trace_step
from sparsetrain.recipes.finetune import Recipe
from tests.families import FAMILIES
from tests.hf.test_outline import llama, real, recipe

AGAIN = {"lora_r": 4, "gradient_checkpointing": "non-reentrant"}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """What was put on the host, as long as somebody holds it."""
    kept: list[weakref.ref[Any]] = []

    class OnHost:
        def __init__(self, array: np.ndarray) -> None:
            self.array = array

    class SaveOnHost(saved_tensors_hooks):
        def __init__(self, **_options: Any) -> None:
            def pack(tensor: Tensor) -> OnHost:
                there = OnHost(tensor.detach().numpy().copy())
                kept.append(weakref.ref(there))
                return there

            super().__init__(pack, lambda there: torch.from_numpy(there.array).clone())

    monkeypatch.setattr(transformers.modeling_utils, "save_on_cpu", SaveOnHost)
    return kept


@pytest.mark.parametrize("reentrant", [False, True])
def test_hidden_states_alone_leave_and_nothing_changes_by_a_bit(host: list[weakref.ref[Any]], reentrant: bool) -> None:
    batch = FAMILIES["llama"].batch(2, 50)
    found = []
    for offload in (False, True):
        model = FAMILIES["llama"].model().train()
        recompute(model, reentrant, offload)
        loss = model(**batch, labels=batch["input_ids"]).loss
        shapes = [there().array.shape for there in host if there() is not None]  # type: ignore[union-attr]
        assert shapes == [(2, 50, 32)] * 3 * offload
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
        del loss
    gc.collect()
    assert host and not any(there() is not None for there in host), "the host's copies are there after the step"
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        assert torch.equal(found[1][1][name], gradient), name


def test_the_plan_is_that_of_a_real_step(host: list[weakref.ref[Any]]) -> None:
    asked = recipe(**AGAIN, activation_offloading=True)
    found = outline(asked, llama(), bf16=False, gpu=True, lengths=(128,))
    peak = found.peak(128)
    model, _ = real(recipe(**AGAIN), llama())
    step = training_step(model, example_batch(asked, model.config, 128, rows=1), False)
    before = saved_activations(model, step).total
    recompute(model, offload=True)
    after = saved_activations(model, step).total
    assert before - after == peak.host == 5 * 128 * 32 * 4
    assert sum(peak.saved_in_full.values()) == pytest.approx(after, rel=0.03)
    assert found.work(128)["host"][1] == 2 * peak.host  # there and back
    trace = trace_step(model, step, None)
    live, most = 0.0, 0.0
    for segment in (trace.before, *trace.forward, trace.head, *reversed(trace.backward)):
        most = max(most, live + segment.peak)
        live += segment.kept
    static = found.static.parameters_trainable + found.static.parameters_frozen + found.static.buffers
    assert peak.total - static - found.static.optimizer == pytest.approx(most, rel=0.1)


def test_it_needs_checkpointing_and_is_no_part_of_what_is_trained() -> None:
    with pytest.raises(ValueError, match=r"gradient_checkpointing=none.*non-reentrant"):
        recipe(activation_offloading=True)
    plain = recipe(**AGAIN)
    assert recipe(**AGAIN, activation_offloading=True, tiled_mlp=4).fingerprint() == plain.fingerprint()
    assert "lora_dtype" not in plain.training_values()  # runs of before it was a key go on
    assert recipe(**AGAIN, lora_dtype="bf16").fingerprint() != plain.fingerprint()
    for wrong in ({"lora_r": 0}, {"dtype": "fp32"}):
        with pytest.raises(ValueError, match="lora_dtype=bf16 stores"):
            Recipe.from_values({"model": "m", "data": "d", "methods": [], "lora_dtype": "bf16", **wrong})
