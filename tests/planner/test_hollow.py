from __future__ import annotations

import importlib.util

import pytest
import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor

from sparsetrain.planner import hollow
from sparsetrain.planner.hollow import Hollow


def test_a_torch_without_the_private_names_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(fake_tensor, "in_kernel_invocation_manager")
    spec = importlib.util.spec_from_file_location("hollow_again", str(hollow.__file__))
    assert spec is not None and spec.loader is not None
    with pytest.raises(ValueError, match=r"in_kernel_invocation_manager.*2\.11 to 2\.13.*--preset dense"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_integers_are_real_and_floats_are_hollow() -> None:
    with Hollow():
        floats, integers = torch.randn(4, 8), torch.arange(6)
        assert isinstance(floats, FakeTensor) and not isinstance(integers, FakeTensor)
        assert integers.cumsum(0).tolist() == [0, 1, 3, 6, 10, 15]
        assert floats[integers[:3]].shape == (3, 8)
        assert floats[torch.tensor([True, False, True, True])].shape == (3, 8)


def test_floats_that_follow_from_integers_stand_with_the_others() -> None:
    with Hollow():
        places = torch.arange(2000)
        nearness = 1 - places / 2000
        assert nearness.device == torch.device("cpu") and isinstance(nearness, FakeTensor)
        assert torch.where(places > 5, torch.rand(2000), nearness).shape == (2000,)


def test_orders_that_follow_from_floats_are_drawn_as_permutations() -> None:
    with Hollow():
        scores = torch.randn(3, 9)
        order = scores.argsort(dim=1, descending=True, stable=True)
        best = scores.topk(4, dim=1).indices
        columns = scores.sort(dim=0).indices
    assert (order.sort(dim=1).values == torch.arange(9)).all()
    assert (columns.sort(dim=0).values == torch.arange(3)[:, None]).all()
    assert all(len(set(row.tolist())) == 4 for row in best)
    with Hollow():
        again = torch.randn(3, 9).argsort(dim=1, descending=True, stable=True)
    assert (again == order).all(), "a recomputed block must choose as its forward did"


def test_a_backward_runs_and_what_is_read_has_a_value() -> None:
    with Hollow():
        x = torch.randn(5, 4, requires_grad=True)
        loss = torch.nn.functional.linear(x, torch.randn(3, 4)).relu().sum()
        loss.backward()
        assert x.grad is not None and x.grad.shape == (5, 4)
        assert float(loss.detach()) == 1.0 and not bool((x > 0).any())
