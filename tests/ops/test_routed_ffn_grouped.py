"""The routed FFN through PyTorch's grouped products, which have a CPU form, against the masked dense loop."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from sparsetrain.core.errors import Unsupported
from sparsetrain.ops.routed_ffn import ACTIVATIONS
from tests.ops.test_routed_ffn import assert_agree, call, make

GROUPED: dict[str, Any] = {"backend": "grouped_mm", "tolerance": 2e-5}


def aligned(**changes: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Sizes whose rows are multiples of 16 bytes in fp32."""
    return make(torch.float32, (4, 8), **{"hidden": 8, "width": 12, "shared": 4} | changes)


@pytest.mark.parametrize("mode", ["output", "ste", "spt"])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_equals_the_masked_dense_loop(mode: str, lora: bool, gated: bool) -> None:
    for shared, bias, shift in ((4, True, True), (0, False, False), (0, True, True)):
        assert_agree(*aligned(lora=lora, gated=gated, shared=shared, bias=bias, shift=shift), gate_mode=mode, **GROUPED)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations(activation: str) -> None:
    assert_agree(*aligned(), activation=activation, **GROUPED)


@pytest.mark.parametrize("mode", ["output", "spt"])
def test_uneven_loads_one_token_and_dropout(mode: str) -> None:
    leaves, options = aligned(active=1, shift=True)
    for choice in (torch.full((37, 1), 2), torch.randint(0, 2, (37, 1)) * 3):
        assert_agree(leaves, options | {"choice": choice}, gate_mode=mode, **GROUPED)
    assert_agree(*aligned(tokens=1), gate_mode=mode, **GROUPED)
    assert_agree(*aligned(), gate_mode=mode, lora_dropout=0.4, **GROUPED)


@pytest.mark.parametrize("mode", ["output", "spt"])
def test_padding_and_dense_tokens_with_memory_full_of_nan(mode: str) -> None:
    """Rows after the last block are never written by the products: what stands there must not count."""
    leaves, options = aligned(shift=True)
    valid, dense = torch.rand(37) > 0.5, torch.rand(37) > 0.7
    torch.use_deterministic_algorithms(True)  # fills every empty() with NaN
    try:
        for rest in ({"valid_t": valid}, {"dense_t": dense}, {"valid_t": valid, "dense_t": dense}):
            assert_agree(leaves, options, gate_mode=mode, **rest, **GROUPED)
        assert_agree(leaves, options, valid_t=torch.zeros(37, dtype=torch.bool), **GROUPED)
    finally:
        torch.use_deterministic_algorithms(False)


def test_weights_may_be_transposed_views_and_frozen() -> None:
    leaves, options = aligned(width=72)
    expected = assert_agree(leaves, options, **GROUPED)
    for name in ("up", "down", "gate_proj"):
        leaves[name] = leaves[name].detach().t().contiguous().t()
    torch.testing.assert_close(assert_agree(leaves, options, **GROUPED), expected)


def test_the_host_waits_for_nothing_in_a_step() -> None:
    """Tensors without values run a whole step: whoever asks for a value fails."""
    leaves, options = make(torch.bfloat16, (8, 16), hidden=8, width=16, shared=8, shift=True)
    valid = torch.rand(37) > 0.5
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = {name: mode.from_tensor(leaf).requires_grad_() for name, leaf in leaves.items()}
        given = options | {"choice": mode.from_tensor(options["choice"])}
        call(fake, given, backend="grouped_mm", valid_t=mode.from_tensor(valid)).sum().backward()
        assert all(leaf.grad is not None for leaf in fake.values())
        with pytest.raises(DataDependentOutputException):
            call(fake, given, backend="torch")


def test_what_grouped_products_refuse() -> None:
    with pytest.raises(Unsupported, match=r"not written for torch\.float64"):
        call(*make(), backend="grouped_mm")
    with pytest.raises(Unsupported, match="16 bytes, not block width 3, LoRA rank 3"):
        call(*make(torch.float32, (4, 3), hidden=8, width=3, shared=4), backend="grouped_mm")
