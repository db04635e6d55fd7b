from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from sparsetrain.measure.memory import static_memory
from sparsetrain.planner.optimizers import KINDS, Shape, state_bytes

MATRIX, BIAS = Shape((512, 300), 4), Shape((50,), 4)


def test_of_bitsandbytes() -> None:
    """As its version 0.50.2 was seen to allocate for such a matrix and such a bias."""
    eight_bit = 2 * (153_600 + 600 * 4)
    assert state_bytes("adamw_8bit", [MATRIX, BIAS]) == (eight_bit + 2 * 50 * 4, 0)
    assert state_bytes("lion_8bit", [MATRIX]) == (eight_bit // 2, 0)
    assert state_bytes("paged_adamw_8bit", [MATRIX, BIAS]) == (2 * 50 * 4, eight_bit)
    assert state_bytes("paged_adamw_32bit", [MATRIX]) == (0, 2 * 4 * 153_600)
    assert state_bytes("a_name_of_tomorrow", [MATRIX]) == state_bytes("adamw_torch", [MATRIX])


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_what_is_here(optim: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(60, 70), nn.Linear(70, 5)).to(dtype)
    arguments = TrainingArguments(output_dir="unused", optim=optim, report_to="none")
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = kind(model.parameters(), **options)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    shapes = [Shape(tuple(p.shape), p.element_size()) for p in model.parameters()]
    assert state_bytes(optim, shapes) == (static_memory(model, optimizer).optimizer_trainable, 0)
    assert optim in KINDS
