from __future__ import annotations

import pytest
import torch

from sparsetrain.hf.study.recipe_trace import outline
from sparsetrain.planner.four_bit import packed_bytes
from sparsetrain.planner.memory import PeakBytes
from tests.hf.test_outline import llama, recipe

AGAIN = {"lora_r": 4, "gradient_checkpointing": "non-reentrant"}


def test_bytes_are_those_of_bitsandbytes() -> None:
    """quantize_4bit of a [512, 300] weight with compress_statistics, version 0.50.2: 76,800 + 2,400 + 10 fp32."""
    assert packed_bytes(512 * 300) == 76_800 + 2_400 + 4 * 10
    assert packed_bytes(1) == 1 + 1 + 4


def test_frozen_linears_shrink_and_one_is_unpacked_at_a_time() -> None:
    def peak(**values: object) -> PeakBytes:
        return outline(recipe(**AGAIN, **values), llama(), bf16=True, gpu=True, lengths=(128,)).peak(128)

    plain, packed = peak(), peak(load_in_4bit=True)
    hidden, kv, ffn, layers = 32, 16, 64, 5
    linears = [hidden * hidden] * 2 + [hidden * kv] * 2 + [hidden * ffn] * 3
    saved = layers * sum(2 * size - packed_bytes(size) for size in linears)
    assert plain.parameters - packed.parameters == saved
    assert packed.saved_in_full == pytest.approx(plain.saved_in_full)
    unpacked = (packed.total - packed.parameters) - (plain.total - plain.parameters)
    assert 0 <= unpacked <= 2 * 2 * hidden * ffn  # the weight of one linear, or of two at the change


def test_an_unpacked_product_has_a_gradient() -> None:
    from sparsetrain.planner.four_bit import FourBit, pack_linears

    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2, bias=False))
    pack_linears(model)
    assert all(isinstance(module, FourBit) and module.weight.dtype == torch.uint8 for module in model)
    x = torch.ones(5, 4, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None and x.grad.shape == (5, 4) and model[0].bias.grad is not None
