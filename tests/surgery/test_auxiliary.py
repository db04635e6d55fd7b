"""Auxiliary losses arrive once and at the right scale, also under a gradient scaler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerState, TrainingArguments

import sparsetrain
from sparsetrain import PQAttention, RoutedFFN
from tests.families import FAMILIES

SCALE = 2.0**16


def gradients(model: Any, scaler: Any, micro_batches: int = 1) -> dict[str, torch.Tensor]:
    """Unscaled gradients of what the methods added, after the backwards of the (scaled) losses of a step."""
    batch = FAMILIES["llama"].batch()
    model.zero_grad()
    for _ in range(micro_batches):
        loss = model(**batch, labels=batch["input_ids"]).loss / micro_batches
        scaler.scale(loss).backward()
    scale = scaler.get_scale()
    own = [name for name, _ in model.named_parameters() if "router" in name or "codebook" in name]
    return {name: model.get_parameter(name).grad / scale for name in own}


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("config", [PQAttention.example(), RoutedFFN.example()], ids=lambda config: config.method)
def test_scaler_and_accumulation_change_no_auxiliary_gradient(config: Any, micro_batches: int, tmp_path: Any) -> None:
    case = FAMILIES["llama"]
    model = case.model()
    handle = sparsetrain.sparsify(model, config, calibration=[case.batch(4)])
    model.train()
    handle.step(0, 10)
    expected = gradients(model, torch.amp.GradScaler("cpu", enabled=False))
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    # as the Trainer calls it: the callback reads the scale off the optimizer that accelerate has wrapped
    optimizer = Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.scaler = scaler
    scaler.scale(torch.ones(()))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], gradient_accumulation_steps=micro_batches
    )
    state = TrainerState(global_step=0, max_steps=10)
    handle.callback(at_end=False).on_step_begin(arguments, state, None, optimizer=optimizer)
    found = gradients(model, scaler, micro_batches)
    assert expected and any(grad.abs().max() > 0 for grad in expected.values())
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-8)
