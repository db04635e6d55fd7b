"""Who attends for selected rows where time decides: made-up times, on a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsetrain.core.backend import choose, use_backend
from sparsetrain.core.fastest import all_timings
from sparsetrain.ops.selected_rows import KeyValues, Rows, attention, choice, selected_attention, varlen
from sparsetrain.ops.selected_rows.library import LIBRARY
from tests.ops.made_up_times import made_up_ms as made_up_ms
from tests.ops.test_selected_rows_backends import off, run
from tests.ops.test_selected_rows_runs import problem
from tests.ops.test_selected_rows_varlen import definition

CPU = torch.device("cpu")
CLOSE = [[0, *range(30, 50)], [0, *range(31, 50)]]
LOOSE = [[*range(20, 40), *range(40, 60, 3)]] * 2
"""27 of 39 queries of a stretch: too few where nothing is timed."""
APART = [range(0, 64, 5), range(1, 64, 7)]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "may_time", lambda _: True)
    monkeypatch.setattr(choice, "no_kernels", lambda *_: "there is no GPU")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that were chosen for calls that name none."""
    names: list[str] = []

    def chosen(op: str, asked: str, found: dict[str, str | None]) -> str:
        name = choose(op, asked, found)
        names.extend([name] if asked == "auto" else [])
        return name

    monkeypatch.setattr(attention, "choose", chosen)
    return names


def call(positions: Any, *, known: bool = False, context: bool = False, **changes: Any) -> Rows:
    rows = Rows.of(positions, 64)
    (_, *selected), e = problem(rows, 4, torch.float32)
    e = replace(e, **changes)
    found = run(selected, e, rows, "auto", known, context)
    assert off(found, run(selected, e, rows, "torch", known, context)) < 2e-5
    return rows


def keys() -> list[str]:
    return [known.key for known in all_timings(CPU)]


@pytest.mark.parametrize("form", [{}, {"known": True}, {"context": True}])
@pytest.mark.parametrize("fast", ["sdpa", "torch"])
def test_rows_that_stand_together(
    fast: str, form: dict[str, bool], made_up_ms: dict[str, float], ran: list[str]
) -> None:
    made_up_ms |= {"sdpa": 2.0, "torch": 2.0, fast: 1.0}
    call(CLOSE, **form)
    made_up_ms.clear()
    call([[0, *range(28, 50)]] * 2, **form)  # the same class, on another selection
    (known,) = all_timings(CPU)
    assert ran == [fast, fast] and not known.failed


def test_a_class_says_what_it_depends_on(made_up_ms: dict[str, float]) -> None:
    made_up_ms |= {"sdpa": 1.0, "torch": 2.0}
    call(CLOSE)
    assert keys() == ["2 x 32 of 64 tokens in stretches of 32, 4 heads (2 of keys) of 8, causal, float32, sdpa torch"]
    call(CLOSE, context=True)
    call(LOOSE)
    assert len(keys()) == 3 and any("in stretches of 64" in key for key in keys())


def test_share_of_a_stretch_is_a_prior_alone(made_up_ms: dict[str, float], ran: list[str]) -> None:
    made_up_ms |= {"sdpa": 1.0, "torch": 2.0}
    rows = call(LOOSE)
    assert ran == ["sdpa"] and rows.run is None and rows.loose_run is not None
    (_, *selected), e = problem(rows, 4, torch.float32)
    assert "less than 75%" in str(choice.available(selected[0], e, rows, trains_others=False)["sdpa"])
    assert "less than 50%" in str(choice.no_run(selected[0], e, Rows.of(APART, 64), timed=True))


def test_what_is_wrong_or_named_is_not_timed_into_a_run(
    made_up_ms: dict[str, float], ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up_ms |= {"torch": 5.0}
    right = LIBRARY["sdpa"]
    monkeypatch.setitem(LIBRARY, "sdpa", lambda *x: 1.1 * right(*x))
    call(CLOSE)
    (known,) = all_timings(CPU)
    assert "off by" in known.failed["sdpa"] and list(known.ms) == ["torch"]
    rows = Rows.of(CLOSE, 64)
    (_, *selected), e = problem(rows, 2, torch.float32)
    with use_backend("torch"):
        selected_attention(*selected, e, rows)
    selected_attention(*selected, e, rows, backend="sdpa")
    assert ran == ["torch", "torch"] and len(keys()) == 1


def test_documents(made_up_ms: dict[str, float], ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of packed rows each document has its stretch; with made-up flash attention."""
    monkeypatch.setattr(varlen, "varlen_attn", definition)
    monkeypatch.setattr(choice, "no_flash", lambda *_: None)
    monkeypatch.setattr(choice, "varlen_fails", lambda *_: None)
    made_up_ms |= {"varlen": 1.0, "torch": 2.0}
    segments = (torch.arange(64) // 32 + 1).expand(2, -1).to(torch.int32)
    call([[*range(20, 32), *range(50, 64, 2)]] * 2, segments_bs=segments, looks_at_bt=segments)
    assert ran == ["varlen"]
    assert keys() == [
        "2 x 32 of 64 tokens in stretches of documents, 32, 4 heads (2 of keys) of 8, causal, packed, float32, "
        "torch varlen"
    ]


def test_a_selection_asks_once_and_a_cpu_never(made_up_ms: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    made_up_ms |= {"sdpa": 1.0, "torch": 2.0}
    rows = Rows.of(CLOSE, 64)
    (_, *selected), e = problem(rows, 4, torch.float32)
    asked: list[Tensor] = []
    true = attention.timings
    monkeypatch.setattr(attention, "timings", lambda *x: asked.append(x[1]) or true(*x))
    for _ in range(3):
        selected_attention(*selected, e, rows)
    assert len(asked) == 3 and len([form for form in rows.masks if form[0] == "timed"]) == 1
    monkeypatch.undo()
    assert not attention.may_time(selected[0])
    selected_attention(*selected, KeyValues(e.k_bgsd, e.v_bgsd, True, 0.4), rows)
