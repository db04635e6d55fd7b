"""The loss head on rows with a target: against cross-entropy of all logits, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparsetrain.core.errors import Unsupported
from sparsetrain.ops.selected_loss import selected_loss
from sparsetrain.ops.selected_loss.cases import TINY, TOLERANCE


def problem() -> dict[str, Any]:
    return TINY[0].arguments()


def tensors(p: dict[str, Any]) -> list[Tensor]:
    return [p["x_nd"], p["weight_vd"], p["bias_v"]]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("chunk_rows", [1, 5, 128])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("normaliser", [None, 60.0, torch.tensor(60)])
def test_equals_cross_entropy(backend: str, chunk_rows: int, softcap: float | None, normaliser: Any) -> None:
    p = problem()
    logits = F.linear(p["x_nd"], p["weight_vd"], p["bias_v"])
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    count = (p["target_n"] != -100).sum() if normaliser is None else normaliser
    expected = F.cross_entropy(logits, p["target_n"], reduction="sum") / count
    found = selected_loss(**p, softcap=softcap, normaliser=normaliser, chunk_rows=chunk_rows, backend=backend)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE["loss"], atol=1e-12)
    for a, e in zip(torch.autograd.grad(3 * found, tensors(p)), torch.autograd.grad(3 * expected, tensors(p))):
        torch.testing.assert_close(a, e, rtol=TOLERANCE["gradient"], atol=1e-12)


def test_passes_gradcheck_with_weights() -> None:
    p = TINY[1].arguments()
    weight = torch.rand(TINY[1].rows, dtype=torch.float64)

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return selected_loss(x, w, p["target_n"], bias_v=b, row_weight_n=weight, softcap=2.0, chunk_rows=2)

    assert torch.autograd.gradcheck(run, tensors(p))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_no_target_is_a_zero_loss_with_zero_gradients(backend: str) -> None:
    p = problem() | {"target_n": torch.full((TINY[0].rows,), -100)}
    loss = selected_loss(**p, backend=backend)
    assert loss == 0
    for grad in torch.autograd.grad(loss, tensors(p)):
        assert not grad.any()


def test_two_parts_with_one_normaliser_equal_the_whole() -> None:
    p = problem()
    count = (p["target_n"] != -100).sum()
    whole = selected_loss(**p)
    parts = [
        selected_loss(p["x_nd"][s], p["weight_vd"], p["target_n"][s], bias_v=p["bias_v"], normaliser=count)
        for s in (slice(0, 11), slice(11, None))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_only_a_chunk_of_logits_exists_and_none_is_saved() -> None:
    n, d, v = 512, 8, 1000
    x, w = torch.randn(n, d, requires_grad=True), torch.randn(v, d)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        loss = selected_loss(x, w, torch.randint(v, (n,)))
    assert sum(saved) == n * d
    loss.backward()


def test_large_and_impossible_logits_stay_finite() -> None:
    x = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    w = torch.tensor([[1.0], [-1.0], [0.0]])
    loss = selected_loss(x, w, torch.tensor([1, 1]), normaliser=1.0)
    torch.testing.assert_close(loss, torch.tensor(2e4))
    loss.backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_autocast_forms_logits_in_bf16_and_the_loss_in_fp32() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(40, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    target = torch.randint(50, (40,))
    exact = selected_loss(x, w, target)
    expected = torch.autograd.grad(exact, (x, w))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = selected_loss(x, w, target)
    assert loss.dtype == torch.float32 and abs(loss - exact) < 0.02 * exact
    for a, e in zip(torch.autograd.grad(loss, (x, w)), expected):
        assert a.dtype == e.dtype and (a - e).norm() < 0.02 * e.norm()


def test_a_backend_asked_for_by_name_does_not_fall_back() -> None:
    with pytest.raises(Unsupported, match="triton"):
        selected_loss(**problem(), backend="triton")
