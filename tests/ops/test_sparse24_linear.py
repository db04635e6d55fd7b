"""The 2:4 linear: every gradient of every mode equals its definition in fp64; kernels agree where there are any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsetrain.core.errors import Unsupported
from sparsetrain.ops.mvue24 import mvue24
from sparsetrain.ops.nm_mask import nm_mask, transposable_mask
from sparsetrain.ops.soft_threshold24 import soft_scale24, soft_threshold24
from sparsetrain.ops.sparse24_linear import pack, sparse24_linear, wgrad_refusal
from sparsetrain.ops.sparse24_linear.cases import REAL, TINY, TOLERANCE, Case
from sparsetrain.ops.sparse24_linear.gain import Gain, gain_together, interleaved, measure_gain
from sparsetrain.ops.sparse24_linear.packing import kernel_refusal
from sparsetrain.ops.sparse24_linear.reference import reference_linear

EXACT = TOLERANCE["emulate"]
BY_NAME = {found.name: found for found in TINY}
MODES = ("transposable", "greedy", "row", "soft")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pruned_weight(w_oi: Tensor, mode: str) -> Tensor:
    w_oi = w_oi.detach()
    if mode == "soft":
        found = soft_threshold24(w_oi)
        return soft_scale24(w_oi, found) * found
    mask = nm_mask(w_oi) if mode == "row" else transposable_mask(w_oi, search="greedy" if mode == "greedy" else "exact")
    return w_oi * mask


def case(mode: str, transposed: bool, of: Case = TINY[0]) -> dict[str, Any]:
    tokens = of.tokens
    w_oi = draw(of.outputs, of.inputs, seed=1)
    pruned = pruned_weight(w_oi, mode)
    store = (lambda t: t.t().contiguous()) if transposed else (lambda t: t)
    return {
        "x": draw(*tokens, of.inputs).requires_grad_(),
        "weight": store(w_oi).requires_grad_(),
        "bias": draw(of.outputs, seed=2).requires_grad_(),
        "pruned_oi": pruned,
        "packed": pack(store(pruned), transposed=transposed),
        "dy": draw(*tokens, of.outputs, seed=3),
    }


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_output_and_gradients_equal_their_definitions(mode: str, transposed: bool) -> None:
    c = case(mode, transposed)
    y = sparse24_linear(c["x"], c["weight"], c["packed"], c["bias"])
    x_ti, dy_to = c["x"].detach().reshape(-1, 8), c["dy"].reshape(-1, 12)
    torch.testing.assert_close(y.reshape(-1, 12), x_ti @ c["pruned_oi"].t() + c["bias"])
    y.backward(c["dy"])
    torch.testing.assert_close(c["x"].grad.reshape(-1, 8), dy_to @ c["pruned_oi"], rtol=EXACT, atol=EXACT)
    dw_oi = dy_to.t() @ x_ti  # dense and unmasked, not M ∘ (dYᵀ X)
    torch.testing.assert_close(c["weight"].grad, dw_oi.t() if transposed else dw_oi, rtol=EXACT, atol=EXACT)
    assert c["weight"].grad.is_contiguous()
    torch.testing.assert_close(c["bias"].grad, dy_to.sum(0), rtol=EXACT, atol=EXACT)


def test_equals_the_reference_and_gradcheck_in_x() -> None:
    c = case("transposable", False)
    wanted = [c["x"], c["weight"], c["bias"]]
    found = torch.autograd.grad(sparse24_linear(c["x"], c["weight"], c["packed"], c["bias"]), wanted, c["dy"])
    expected = torch.autograd.grad(reference_linear(c["x"], c["weight"], c["pruned_oi"], c["bias"]), wanted, c["dy"])
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT)
    weight = c["weight"].detach()
    assert torch.autograd.gradcheck(lambda x, b: sparse24_linear(x, weight, c["packed"], b), (c["x"], c["bias"]))


@pytest.mark.parametrize("transposed", [False, True])
def test_mvue_draws_the_weight_gradient_and_nothing_else(transposed: bool) -> None:
    c = case("transposable", transposed, BY_NAME["odd"])
    generator = torch.Generator().manual_seed(5)
    y = sparse24_linear(c["x"], c["weight"], c["packed"], c["bias"], wgrad="mvue", generator=generator)
    y.backward(c["dy"])
    dy_to, x_ti = c["dy"].reshape(-1, 12), c["x"].detach().reshape(-1, 8)
    drawn = mvue24(dy_to, 0, generator=torch.Generator().manual_seed(5))
    dw_oi = drawn.t() @ x_ti
    torch.testing.assert_close(c["weight"].grad, dw_oi.t() if transposed else dw_oi)
    torch.testing.assert_close(c["x"].grad.reshape(-1, 8), dy_to @ c["pruned_oi"])
    torch.testing.assert_close(c["bias"].grad, dy_to.sum(0))


def test_mvue_weight_gradient_is_unbiased() -> None:
    c = case("row", False, BY_NAME["one_axis"])
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(2000):
        y = sparse24_linear(c["x"], c["weight"], c["packed"], wgrad="mvue", generator=generator)
        draws.append(torch.autograd.grad(y, c["weight"], c["dy"])[0])
    found = torch.stack(draws)
    dense = c["dy"].t() @ c["x"].detach()
    z = (found.mean(0) - dense) / (found.std(0) / len(draws) ** 0.5)
    assert z.abs().max() < 4.5 and abs(float(z.square().mean()) - 1) < 0.5  # 96 entries


def test_fewer_than_four_tokens_stay_dense_and_one_token_works() -> None:
    c = case("row", False, BY_NAME["few_tokens"])
    sparse24_linear(c["x"], c["weight"], c["packed"], wgrad="mvue").backward(c["dy"])
    torch.testing.assert_close(c["weight"].grad, c["dy"][0].t() @ c["x"].detach()[0])


def test_frozen_weights_save_no_input_and_frozen_inputs_no_weight() -> None:
    c = case("row", False)
    for x_grad, w_grad, kept in ((True, False, 1), (False, True, 1), (False, False, 0)):
        saved: list[Tensor] = []
        c["x"].requires_grad_(x_grad)
        c["weight"].requires_grad_(w_grad)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            sparse24_linear(c["x"], c["weight"], c["packed"])
        assert len(saved) == kept


def test_autocast_runs_in_its_dtype_and_gradients_come_back_in_the_weights() -> None:
    w = draw(12, 8, seed=1, dtype=torch.float32).requires_grad_()
    x = draw(5, 8, dtype=torch.float32).requires_grad_()
    packed = pack(pruned_weight(w, "row"))
    expected = sparse24_linear(x, w, packed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse24_linear(x, w, packed, torch.zeros(12))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert w.grad is not None and w.grad.dtype == torch.float32
    assert x.grad is not None and x.grad.dtype == torch.float32


def test_changing_the_packed_weight_before_the_backward_is_an_error_not_a_wrong_gradient() -> None:
    c = case("row", False)
    y = sparse24_linear(c["x"], c["weight"], c["packed"])
    c["packed"].forward.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(c["dy"])


def test_kernels_are_refused_with_the_reason_and_never_fall_back() -> None:
    pruned = pruned_weight(draw(64, 64), "row").to(torch.bfloat16)
    if not torch.cuda.is_available():
        for name in ("cusparselt", "cutlass"):
            with pytest.raises(Unsupported, match=f"'{name}': the weight is on cpu"):
                pack(pruned, backend=name)
    with pytest.raises(Unsupported, match="torch core's operators"):
        pack(pruned, backend="triton")
    assert pack(pruned, backend="reference").backend == "emulate"
    assert pack(pruned).nbytes() == 64 * 64 * 2
    with pytest.raises(ValueError, match="x has 4 channels and the weight"):
        sparse24_linear(draw(2, 4), draw(12, 8), pack(draw(12, 8)))
    with pytest.raises(ValueError, match="wgrad='sparse' is unknown"):
        sparse24_linear(draw(2, 8), draw(12, 8), pack(draw(12, 8)), wgrad="sparse")


@pytest.mark.parametrize(
    ("capability", "dtype", "shape", "reason"),
    [
        ((7, 5), torch.bfloat16, (64, 64), "compute capability 7.5 was found"),
        ((9, 0), torch.bfloat16, (64, 64), "need 8.x"),
        ((8, 0), torch.float32, (64, 64), "is torch.float32"),
        ((8, 0), torch.bfloat16, (64, 96), "64x96, and both sizes must be multiples of 64"),
        ((8, 0), torch.bfloat16, (64, 128), None),
    ],
)
def test_what_cutlass_needs(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, shape: Any, reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = kernel_refusal("cutlass", shape, dtype, torch.device("cuda"))
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_where_nothing_can_run_the_gain_says_why() -> None:
    gain = measure_gain(64, 64, 128, device="cpu")
    assert not gain.pays and gain.ratio == 0
    assert "no 2:4 product can run" in str(gain) and "on cpu" in str(gain)


def test_weights_that_do_not_pay_count_as_dense_beside_those_that_do() -> None:
    about: Any = {"out_features": 8, "in_features": 4, "tokens": 2, "dtype": "bfloat16", "backend": "cusparselt"}
    pays = Gain(**about, dense_ms=3.0, sparse_ms=2.0, ratio=1.5)
    loses = Gain(**about, dense_ms=1.0, sparse_ms=4.0, ratio=0.25)
    assert gain_together([pays, loses]) == 4 / 3 and gain_together([loses]) == gain_together([]) == 1


@pytest.mark.parametrize(("tokens", "outputs", "sparse"), [(128, 192, True), (100, 192, False), (128, 96, False)])
def test_which_drawn_weight_gradients_are_sparse_products(tokens: int, outputs: int, sparse: bool) -> None:
    found = wgrad_refusal(tokens, outputs)
    assert found is None if sparse else f"{outputs}x{tokens}" in str(found)


@pytest.mark.parametrize(("ratio", "pays"), [(1.149, False), (1.15, True), (1.6, True)])
def test_it_pays_from_the_stated_ratio_on(ratio: float, pays: bool) -> None:
    gain = Gain(
        out_features=8, in_features=4, tokens=2, dtype="bfloat16", backend="cusparselt",
        dense_ms=ratio, sparse_ms=1.0, pack_ms=0.1, ratio=ratio,
    )  # fmt: skip
    assert gain.pays == pays
    assert ("goes sparse" in str(gain)) == pays and f"{ratio:.2f}x" in str(gain)


def test_both_sides_run_in_turns_whose_order_flips() -> None:
    order: list[str] = []
    interleaved(lambda: order.append("dense"), lambda: order.append("sparse"), 5, torch.device("cpu"))
    assert order == (["sparse", "dense", "dense", "sparse"] * 4)[: 2 * 8]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cusparselt", "cutlass"])
@pytest.mark.parametrize("mode", ["transposable", "row"])
@pytest.mark.parametrize("wgrad", ["dense", "mvue"])
@pytest.mark.parametrize("transposed", [False, True])
def test_kernels_agree_with_emulation(backend: str, mode: str, wgrad: str, transposed: bool) -> None:
    of, device = REAL[0], torch.device("cuda")
    shape = (of.outputs, of.inputs)
    if reason := kernel_refusal(backend, shape, torch.bfloat16, device):
        pytest.skip(reason)
    w_oi = draw(*shape, seed=1, dtype=torch.float32).to(device, torch.bfloat16)
    pruned = pruned_weight(w_oi, mode)
    x, dy = (draw(*of.tokens, n, seed=n, dtype=torch.float32).to(device, torch.bfloat16) for n in shape[::-1])
    results = []
    for name in ("emulate", backend):
        store = (lambda t: t.t().contiguous()) if transposed else (lambda t: t)
        weight, xs = store(w_oi).clone().requires_grad_(), x.clone().requires_grad_()
        packed = pack(store(pruned), transposed=transposed, transposable=mode == "transposable", backend=name)
        generator = torch.Generator(device).manual_seed(0)
        y = sparse24_linear(xs, weight, packed, wgrad=wgrad, generator=generator)
        results.append((y, *torch.autograd.grad(y, [xs, weight], dy)))
    for one, other in zip(*results):
        assert (one.float() - other.float()).norm() < TOLERANCE["kernel"] * one.float().norm()
    assert packed.nbytes() < (1.3 if mode == "transposable" else 1.7) * w_oi.numel() * 2


@pytest.mark.gpu
def test_the_gain_is_measured_on_the_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    gain = measure_gain(1024, 1024, 2048, rounds=5)
    assert gain.reason is not None or (gain.dense_ms > 0 and gain.sparse_ms > gain.pack_ms > 0 and gain.ratio > 0)
