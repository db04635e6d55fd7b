"""Ratios with a clock that only the timed functions move, so that every number is known."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from sparsetrain.measure import timing
from sparsetrain.measure.timing import compare, forward_time_by_component, ratio, time_step, verdict
from tests.measure.tiny import VOCAB, TinyModel


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(timing, "clock", lambda _device: ("known", lambda: self.time))

    def takes(self, name: str, *seconds: float) -> Callable[[], None]:
        left = list(seconds)

        def function() -> None:
            self.calls.append(name)
            self.time += left.pop(0) if len(left) > 1 else left[0]

        return function


def test_compare_flips_the_order_and_takes_the_median_of_round_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    # the machine slows down fourfold after the warm-up and the first round, for both alike
    found = compare(clock.takes("b", 2, 2, 8), clock.takes("c", 1, 1, 4), rounds=4)
    assert clock.calls == ["b", "c", "b", "c", "c", "b", "b", "c", "c", "b"]
    assert found.baseline_s == (2, 8, 8, 8) and found.candidate_s == (1, 4, 4, 4)
    assert (found.q1, found.median, found.q3) == (2, 2, 2)
    assert found.verdict == "win" and found.clock == "known"
    assert found.to_dict()["median"] == 2


def test_a_loss_is_called_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert compare(clock.takes("b", 1), clock.takes("c", 1.25)).verdict == "loss"


def test_verdicts_need_the_quartiles_on_one_side_and_three_percent() -> None:
    assert verdict(1.2, 1.1, 1.3) == "win"
    assert verdict(1.2, 0.9, 1.3) == "tie"
    assert verdict(1.02, 1.01, 1.03) == "tie"
    assert verdict(0.8, 0.7, 0.9) == "loss"
    assert verdict(0.8, 0.7, 1.1) == "tie"


def test_quartiles_are_of_the_round_ratios() -> None:
    found = ratio([1, 2, 3, 4, 5], [1, 1, 1, 1, 1])
    assert (found.q1, found.median, found.q3) == (2, 3, 4)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        compare(lambda: None, lambda: None, rounds=2)
    with pytest.raises(ValueError, match="do not pair"):
        ratio([1, 2, 3], [1, 2])


def test_one_thread_is_timed_by_cpu_time() -> None:
    if torch.get_num_threads() != 1:
        pytest.skip("runs with one thread")
    found = compare(lambda: time.sleep(0.02), lambda: sum(range(20_000)), rounds=3)
    assert found.clock == "process CPU time"
    assert max(found.baseline_s) < 0.02  # sleeping costs no CPU time


def test_a_training_step_is_split_in_three_and_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, model = Clock(monkeypatch), TinyModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids_t = torch.arange(VOCAB)
    losses: list[float] = []

    def forward() -> torch.Tensor:
        clock.time += 3
        loss = model(ids_t, ids_t)
        loss.register_hook(lambda grad: clock.takes("backward", 5)())
        losses.append(loss.item())
        return loss

    optimizer.register_step_pre_hook(lambda *_: clock.takes("step", 2)())
    found = time_step(forward, optimizer, steps=4, warmup=2)
    assert (found.forward_s, found.backward_s, found.optimizer_s, found.total_s) == (3, 5, 2, 10)
    assert found.num_steps == 4 and len(losses) == 6 and losses[-1] < losses[0]
    assert all(param.grad is None for param in model.parameters())


def test_forward_time_goes_to_the_innermost_component(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, model = Clock(monkeypatch), TinyModel(num_layers=2)
    hooks = []
    for module, seconds in (
        (model.embed, 1),
        (model.layers[0].mlp.up, 2),  # type: ignore[union-attr]
        (model.layers[1].mlp, 4),  # type: ignore[union-attr]
        (model.layers[1].attn, 8),  # type: ignore[union-attr]
        (model.layers[0], 16),
        (model.head, 32),
    ):
        hooks.append(module.register_forward_pre_hook(lambda *_, seconds=seconds: clock.takes("", seconds)()))

    def forward() -> torch.Tensor:
        logits = model(torch.zeros(3, dtype=torch.long))
        clock.time += 64  # the loss
        return logits

    found = forward_time_by_component(model, forward, rounds=3)
    expected = {"embedding": 1, "ffn": 6, "attention": 8, "other": 16, "head_and_loss": 96, "norms": 0, "adapters": 0}
    assert found == expected
