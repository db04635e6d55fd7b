"""profile(): who is at work when, what is alive when, and that a step is left as it was."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparsetrain.measure import profile, saved_activations, static_memory
from sparsetrain.measure.components import Place
from sparsetrain.measure.cuda_history import course
from sparsetrain.measure.follow import following
from sparsetrain.measure.profile_report import page, picture, tables
from tests.measure.tiny import VOCAB, TinyModel

IDS_T = torch.arange(7) % VOCAB


class Slow(torch.autograd.Function):
    """Moves a clock by hand: 3 in the forward, 5 in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: list[float]) -> Tensor:
        ctx.clock = clock
        clock[0] += 3
        return x * 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.clock[0] += 5
        return grads[0], None


def slow(model: TinyModel, path: str, clock: list[float]) -> None:
    module = model.get_submodule(path)
    before = module.forward
    module.forward = lambda x: Slow.apply(before(x), clock)  # type: ignore[method-assign]


def training(model: TinyModel, inside: bool = True) -> tuple[Any, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        loss = model(IDS_T, IDS_T) if inside else F.cross_entropy(model(IDS_T), IDS_T)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, optimizer


def test_time_goes_to_the_component_that_works_in_both_passes() -> None:
    model, clock = TinyModel(), [0.0]
    for path in ("layers.0.attn", "layers.1.mlp", "head"):
        slow(model, path, clock)
    step, _ = training(model)
    with following(model, lambda: clock[0]) as found:
        step()
    spent = {key: seconds for key, seconds in found.spent.items() if seconds}
    places = (Place("attention", 0), Place("ffn", 1), Place("head_and_loss"))
    expected = {(phase, place): s for phase, s in (("forward", 3.0), ("backward", 5.0)) for place in places}
    assert spent == expected


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_counts_to_the_backward_of_its_component(reentrant: bool) -> None:
    model, clock = TinyModel(), [0.0]
    slow(model, "layers.1.attn", clock)  # recomputation stops before what nothing after it needs
    layer = model.layers[1]
    before = layer.forward
    layer.forward = lambda x: checkpoint(before, x, use_reentrant=reentrant)  # type: ignore[method-assign]
    step, _ = training(model)
    with following(model, lambda: clock[0]) as found:
        step()
    spent = {key: seconds for key, seconds in found.spent.items() if seconds}
    assert spent == {("forward", Place("attention", 1)): 3.0, ("backward", Place("attention", 1)): 8.0}


@pytest.mark.parametrize("inside", [True, False])
def test_a_profile_agrees_with_the_counts_made_apart(inside: bool) -> None:
    model = TinyModel()
    step, optimizer = training(model, inside)
    found = profile(model, step, steps=2)
    model(IDS_T, IDS_T).backward()
    assert found.static == static_memory(model, optimizer)
    assert found.static.gradients == found.static.parameters_trainable
    optimizer.zero_grad()
    assert found.saved == saved_activations(model, lambda: model(IDS_T, IDS_T))
    parts = found.live.peak.bytes_by_part
    assert parts["weights"] == found.static.parameters_trainable
    assert parts["optimizer"] == found.static.optimizer_trainable
    assert 0 < parts["saved"] <= found.saved.total
    assert found.live.peak.total >= max(moment.total for moment in found.live.moments)
    first, last = found.live.moments[0], found.live.moments[-1]
    assert first.total == parts["weights"] + parts["optimizer"]
    assert last.total == first.total + IDS_T.nbytes  # the batch, which the loop holds
    assert {moment.phase for moment in found.live.moments} == {"forward", "backward", "optimizer"}


def test_the_peak_is_that_of_tensors_alive_at_one_time() -> None:
    model = TinyModel()
    step, _ = training(model)
    plain = profile(model, step).live.peak.total

    def wasteful() -> None:
        big = torch.zeros(250_000)
        del big
        other = torch.zeros(250_000)
        del other
        step()

    found = profile(model, wasteful).live
    assert 1_000_000 < found.peak.total < 1_000_000 + plain
    assert found.temporary_peak_bytes == 1_000_000


def test_hooks_are_gone_and_numbers_are_those_of_a_step_without_us() -> None:
    torch.manual_seed(0)
    model = TinyModel()
    torch.manual_seed(0)
    twin = TinyModel()
    profile(model, training(model)[0])
    step, _ = training(twin)
    for _ in range(3):  # warm-up, timed, traced
        step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_step_without_a_backward_and_counts_below_one_are_errors() -> None:
    model = TinyModel()
    with pytest.raises(ValueError, match="no backward ran"):
        profile(model, lambda: model(IDS_T))
    with pytest.raises(ValueError, match="at least 1"):
        profile(model, training(model)[0], steps=0)


def test_the_course_of_an_allocator_counts_what_is_held() -> None:
    actions = [("alloc", 100), ("alloc", 50), ("free_requested", 100), ("free_completed", 100), ("segment_alloc", 999)]
    entries = [{"action": a, "size": n, "time_us": 10 * i} for i, (a, n) in enumerate(actions)]
    assert course(entries, before=7) == [(0.0, 107), (1e-5, 157), (3e-5, 57)]
    assert course([], before=7) == []


def test_tables_the_picture_and_the_page_hold_every_side() -> None:
    model = TinyModel()
    side = profile(model, training(model)[0]).to_dict()
    sides = {"sparse": side, "dense": side}
    found = tables(sides, layers=True)
    assert [len(columns) for _, columns, _ in found] == [3, 3, 5, 7]
    for _, columns, rows in found:
        assert all(len(row) == len(columns) for row in rows)
    assert any(row[0] == "FFN" for row in found[1][2])
    assert picture(sides).startswith(b"\x89PNG")
    written = page("a <title>", sides, ["a note"])
    assert "a &lt;title&gt;" in written and "a note" in written
    assert list(itertools.accumulate(m.at_s for m in profile(model, training(model)[0]).live.moments))
