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
    found = compare(clock.takes("b", 2, 2, 8), clock.takes("c", 1, 1, 4), rounds=7)
    assert clock.calls == ["b", "c", "b", "c", *("c", "b", "b", "c") * 3]
    assert found.baseline_s == (2, *[8] * 6) and found.candidate_s == (1, *[4] * 6)
    assert (found.q1, found.median, found.q3, found.low, found.high) == pytest.approx((2, 2, 2, 2, 2))
    assert found.verdict == "win" and found.clock == "known"
    assert found.to_dict()["median"] == 2


def test_a_loss_is_called_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert compare(clock.takes("b", 1), clock.takes("c", 1.25)).verdict == "loss"


def test_a_verdict_needs_an_interval_that_excludes_a_tie() -> None:
    assert verdict(1.03, 1.3) == "win"
    assert verdict(1.01, 1.3) == "tie"  # it may be 1 % faster
    assert verdict(0.7, 0.97) == "loss"
    assert verdict(0.7, 0.99) == "tie"
    assert verdict(0.99, 1.01) == "tie"
    assert verdict(None, None) == "tie"


def test_five_pairs_are_no_win_and_noise_is_a_tie() -> None:
    assert ratio([1.05] * 5, [1.0] * 5).verdict == "tie"
    assert ratio([1.05] * 7, [1.0] * 7).verdict == "win"
    noisy = ratio([1.3, 0.9, 1.2, 1.1, 0.95, 1.25, 1.0, 1.05], [1.0] * 8)
    assert noisy.median > 1.05 and noisy.verdict == "tie" and not noisy.decided


def test_more_pairs_are_taken_while_it_is_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    few = compare(clock.takes("b", 1.5), clock.takes("c", 1), rounds=3)
    assert len(few.baseline_s) == 9 and few.verdict == "win"  # 3 and 6 pairs give no interval
    same = compare(clock.takes("b", 1), clock.takes("c", 1), rounds=7)
    assert len(same.baseline_s) == 7 and same.verdict == "tie" and same.decided
    wild = compare(clock.takes("b", *[1, 2] * 50), clock.takes("c", 1.4), rounds=7)
    assert len(wild.baseline_s) == 21 and wild.verdict == "tie" and not wild.decided


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
