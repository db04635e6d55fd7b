"""Which products a routed FFN takes: by rule on a CPU, by time where both can be timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsetrain.core.fastest import all_timings
from sparsetrain.ops import routed_ffn as op
from sparsetrain.ops.routed_ffn import choice
from sparsetrain.ops.routed_ffn.problem import Problem
from tests.ops.made_up_times import made_up_ms as made_up_ms
from tests.ops.test_routed_ffn import call
from tests.ops.test_routed_ffn_grouped import aligned


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that ran calls, in turn; all of them are timed as on a GPU."""
    names: list[str] = []
    for name, run in op._RUN.items():
        monkeypatch.setitem(op._RUN, name, lambda p, name=name, run=run: names.append(name) or run(p))
    monkeypatch.setattr(choice, "may_time", lambda _: True)
    return names


@pytest.mark.parametrize("fast", ["grouped_mm", "torch"])
def test_auto_takes_what_took_less_time_and_times_a_shape_once(
    fast: str, made_up_ms: dict[str, float], ran: list[str]
) -> None:
    made_up_ms |= {"grouped_mm": 2.0, "torch": 2.0, fast: 1.0}
    leaves, options = aligned(shift=True)
    call(leaves, options, lora_dropout=0.4)
    made_up_ms |= {"grouped_mm": 2.0, "torch": 2.0}  # not looked at: 37 and 40 tokens are one shape
    call(*aligned(shift=True, tokens=40), lora_dropout=0.4)
    assert ran == [fast, fast]
    (known,) = all_timings(torch.device("cpu"))
    assert known.key == (
        "64 tokens of 8, 2 of 4 blocks of 12, 4 units always on, gated silu, LoRA of [8, 4, 4], with c, float32"
    )
    assert all(leaf.grad is None for leaf in leaves.values()), "nothing reaches the weights"


@pytest.mark.parametrize("changes", [{"lora": False}, {"gated": False, "shared": 0, "bias": False}])
def test_other_forms_are_timed(changes: dict[str, Any], made_up_ms: dict[str, float], ran: list[str]) -> None:
    made_up_ms |= {"grouped_mm": 1.0, "torch": 2.0}
    call(*aligned(**changes))
    assert ran == ["grouped_mm"] and not all_timings(torch.device("cpu"))[0].failed


def test_what_broke_is_not_taken_and_what_is_named_is_not_timed(
    made_up_ms: dict[str, float], ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Problem) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(choice.TIMED, "grouped_mm", broken)
    made_up_ms |= {"torch": 9.0}
    leaves, options = aligned()
    call(leaves, options, backend="grouped_mm")
    assert not all_timings(torch.device("cpu"))
    call(leaves, options)
    assert ran == ["grouped_mm", "torch"]
    (known,) = all_timings(torch.device("cpu"))
    assert known.failed == {"grouped_mm": "RuntimeError: no such kernel"}


def test_nothing_is_timed_on_a_cpu(made_up_ms: dict[str, float]) -> None:
    call(*aligned())
    assert not all_timings(torch.device("cpu"))
