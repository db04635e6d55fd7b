"""The grouped routed FFN against the masked dense loop, forward and every gradient."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.core.errors import Unsupported
from sparsetrain.ops.linear_parts import LinearParts
from sparsetrain.ops.routed_ffn import ACTIVATIONS, routed_ffn
from sparsetrain.ops.routed_ffn.cases import TINY, TOLERANCE
from sparsetrain.ops.routing import choose_blocks

WIDTHS = [case.width for case in TINY]


def make(
    dtype: torch.dtype = torch.float64, ranks: tuple[int, int] = (2, 3), **changes: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, options) of the first tiny case with some sizes changed; `ranks` of the gate's LoRA last."""
    case = replace(TINY[0], **changes)
    torch.manual_seed(case.tokens + case.width)
    t, d, f, (r, gate_r) = case.tokens, case.hidden, case.ffn_size, ranks
    rand = lambda *shape: torch.randn(*shape, dtype=dtype) * 0.5  # noqa: E731
    leaves = {"x": rand(t, d), "up": rand(f, d), "down": rand(d, f)}
    leaves |= {"gate_proj": rand(f, d)} if case.gated else {}
    leaves |= {"up_bias": rand(f), "down_bias": rand(d)} if case.bias else {}
    leaves |= {"gate_bias": rand(f)} if case.bias and case.gated else {}
    if case.lora:
        leaves |= {"up_a": rand(r, d), "up_b": rand(f, r), "down_a": rand(r, f), "down_b": rand(d, r)}
        leaves |= {"gate_a": rand(gate_r, d), "gate_b": rand(f, gate_r)} if case.gated else {}
    leaves |= {"shift": rand(case.blocks, d)} if case.shift else {}
    choice = choose_blocks(torch.randn(t, case.blocks), case.active)
    leaves["c"] = 2 * torch.sigmoid(rand(t, case.active))
    options = {"choice": choice, "num_shared": case.shared, "num_blocks": case.blocks, "activation": "silu"}
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}, options


def call(leaves: dict[str, Tensor], options: dict[str, Any], **changes: Any) -> Tensor:
    rest = {key: value for key, value in options.items() if key != "choice"} | changes
    dropout = rest.pop("lora_dropout", 0.0)

    def linear(name: str, weight: str) -> LinearParts:
        lora = (leaves[f"{name}_a"], leaves[f"{name}_b"]) if f"{name}_a" in leaves else None
        return LinearParts(leaves[weight], leaves.get(f"{name}_bias"), lora, dropout)

    return routed_ffn(
        leaves["x"],
        linear("up", "up"),
        linear("down", "down"),
        options["choice"],
        leaves.get("c"),
        gate=linear("gate", "gate_proj") if "gate_proj" in leaves else None,
        block_shift_gd=leaves.get("shift"),
        **rest,
    )


def assert_agree(
    leaves: dict[str, Tensor],
    options: dict[str, Any],
    backend: str = "torch",
    tolerance: float = TOLERANCE["float64"],
    **changes: Any,
) -> Tensor:
    results = []
    for name in (backend, "reference"):
        torch.manual_seed(1)  # dropout draws the same masks
        y = call(leaves, options, backend=name, **changes)
        wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
        grads = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum(), wanted,
                                    allow_unused=True, materialize_grads=True)  # fmt: skip
        results.append((y, *grads))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    return results[0][0]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("mode", ["output", "ste", "spt"])
def test_equals_the_masked_dense_loop(mode: str, lora: bool, gated: bool, width: int) -> None:
    for shared, bias, shift in ((2, True, True), (0, False, False), (0, True, True)):
        assert_agree(*make(width=width, lora=lora, gated=gated, shared=shared, bias=bias, shift=shift), gate_mode=mode)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations(activation: str) -> None:
    for gated in (True, False):
        assert_agree(*make(gated=gated), activation=activation)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("mode", ["output", "spt"])
def test_loads_that_are_uneven(mode: str, width: int) -> None:
    leaves, options = make(width=width, active=1, shift=True)
    for choice in (torch.full((37, 1), 2), torch.randint(0, 2, (37, 1)) * 3):
        assert_agree(leaves, options | {"choice": choice}, gate_mode=mode)
    assert_agree(*make(tokens=1, width=width), gate_mode=mode)
    assert_agree(*make(tokens=1100, hidden=3, width=width, active=3), gate_mode=mode)


@pytest.mark.parametrize("width", WIDTHS)
def test_padding_uses_no_block(width: int) -> None:
    leaves, options = make(width=width, shift=True)
    valid = torch.rand(37) > 0.5
    assert_agree(leaves, options, valid_t=valid)
    assert_agree(leaves, options, valid_t=torch.zeros(37, dtype=torch.bool))
    moved = options["choice"].clone()
    moved[~valid] = moved[~valid].flip(1)
    assert torch.equal(call(leaves, options, valid_t=valid), call(leaves, options | {"choice": moved}, valid_t=valid))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("mode", ["output", "spt"])
def test_dropout_is_on_lora_alone(mode: str, width: int) -> None:
    assert_agree(*make(width=width), gate_mode=mode, lora_dropout=0.4)
    leaves, options = make(width=width)
    for name in ("up_b", "gate_b", "down_b"):
        leaves[name] = torch.zeros_like(leaves[name])
    torch.testing.assert_close(call(leaves, options, lora_dropout=0.4), call(leaves, options))


def test_all_blocks_is_the_dense_ffn() -> None:
    leaves, options = make(active=4, lora=False)
    dense = F.silu(F.linear(leaves["x"], leaves["gate_proj"], leaves["gate_bias"]))
    dense = dense * F.linear(leaves["x"], leaves["up"], leaves["up_bias"])
    dense = F.linear(dense, leaves["down"], leaves["down_bias"])
    ones = leaves | {"c": torch.ones(37, 4, dtype=torch.float64)}
    for mode in ("output", "ste", "spt"):
        torch.testing.assert_close(call(ones, options, gate_mode=mode), dense)
    del leaves["c"]
    torch.testing.assert_close(assert_agree(leaves, options), dense)


@pytest.mark.parametrize("mode", ["output", "spt"])
def test_gradcheck(mode: str) -> None:
    leaves, options = make(tokens=4, hidden=3, width=2, shift=True)
    names = list(leaves)

    def run(*values: Tensor) -> Tensor:
        return call(dict(zip(names, values)), options, gate_mode=mode, activation="gelu", backend="torch")

    assert torch.autograd.gradcheck(run, tuple(leaves.values()))


def test_weights_may_be_transposed_views_and_frozen() -> None:
    leaves, options = make(width=70)
    expected = assert_agree(leaves, options)
    for name in ("up", "down", "gate_proj"):
        leaves[name] = leaves[name].detach().t().contiguous().t()
    torch.testing.assert_close(assert_agree(leaves, options), expected)


@pytest.mark.parametrize("width", WIDTHS)
def test_reads_no_memory_it_did_not_write(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for shared in (0, 2):
        leaves, options = make(width=width, shared=shared, shift=True)
        assert_agree(leaves, options)
        with monkeypatch.context() as patch:
            patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
            torch.use_deterministic_algorithms(True)
            try:
                assert_agree(leaves, options)
            finally:
                torch.use_deterministic_algorithms(False)


def test_saves_pre_activations_of_active_units_only() -> None:
    leaves, options = make(tokens=256, hidden=5, width=80, blocks=4, active=1, shared=0, lora=False, bias=False)
    frozen = {name: leaf.detach().requires_grad_(name in ("x", "c")) for name, leaf in leaves.items()}
    known = {leaf.untyped_storage().data_ptr() for leaf in frozen.values()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(frozen, options)
    pre_activations = 256 * 80 * 2 * 8
    assert pre_activations <= sum(sizes.values()) < 1.35 * pre_activations


def test_bf16_and_autocast_stay_close_to_fp32() -> None:
    leaves, options = make(dtype=torch.float32, width=8)
    expected = call(leaves, options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = call(leaves, options)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() / expected.norm() < 2e-2
    found.sum().backward()
    assert leaves["up_b"].grad is not None and leaves["up_b"].grad.dtype == torch.float32


def test_router_gets_gradient_in_every_mode() -> None:
    for mode in ("output", "ste", "spt"):
        leaves, options = make()
        call(leaves, options, gate_mode=mode).square().sum().backward()
        assert leaves["c"].grad is not None and leaves["c"].grad.abs().min() > 0


def test_errors_say_what_to_do() -> None:
    leaves, options = make()
    with pytest.raises(Unsupported, match="triton"):
        call(leaves, options, backend="triton")
    for changes in ({"num_blocks": 5}, {"activation": "tanhshrink"}, {"gate_mode": "soft"}, {"lora_dropout": 1.0}):
        with pytest.raises(ValueError, match="routed_ffn"):
            call(leaves, options, **changes)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("mode", ["output", "ste", "spt"])
def test_dense_tokens_go_through_the_dense_ffn(mode: str, width: int) -> None:
    leaves, options = make(width=width, shift=True)
    dense, valid = torch.rand(37) > 0.7, torch.rand(37) > 0.3
    y = assert_agree(leaves, options, gate_mode=mode, dense_t=dense)
    assert_agree(leaves, options, gate_mode=mode, dense_t=dense, valid_t=valid)
    assert_agree(leaves, options, gate_mode=mode, dense_t=torch.ones(37, dtype=torch.bool))
    # the rows are those of two calls: all blocks without gates or stand-ins, and the routed one
    plain = {name: leaf for name, leaf in leaves.items() if name not in ("c", "shift")}
    every = torch.arange(options["num_blocks"]).expand(37, -1)
    torch.testing.assert_close(y[dense], call(plain, options | {"choice": every})[dense])
    torch.testing.assert_close(y[~dense], call(leaves, options, gate_mode=mode)[~dense])


def test_dense_tokens_pass_gradcheck() -> None:
    leaves, options = make(tokens=5, hidden=3, width=2, shift=True)
    names, dense = list(leaves), torch.tensor([True, False, False, True, False])

    def run(*values: Tensor) -> Tensor:
        return call(dict(zip(names, values)), options, activation="gelu", backend="torch", dense_t=dense)

    assert torch.autograd.gradcheck(run, tuple(leaves.values()))


def test_dense_tokens_send_no_gradient_to_gates_and_stand_ins() -> None:
    leaves, options = make(shift=True)
    dense = torch.arange(37) % 3 == 0
    y = call(leaves, options, dense_t=dense)
    gate, shift = torch.autograd.grad(y[dense].square().sum(), (leaves["c"], leaves["shift"]), retain_graph=True)
    assert not gate.any() and shift.abs().max() < 1e-12  # what was added and taken away again
    assert torch.autograd.grad(y[~dense].sum(), leaves["c"])[0][~dense].any()
