"""Eight short runs give what they gave when they were recorded: on the same machine, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import recorded

MOST_LINES = 20
NAMES = [pytest.param(n, marks=pytest.mark.assets if n == "classify" else ()) for n in recorded.RUNS]


@pytest.mark.slow  # each run is a process of its own that imports everything, reads real text and trains
@pytest.mark.parametrize("name", NAMES)
def test_a_run_gives_what_was_recorded(name: str, tmp_path: Path) -> None:
    strict, found = recorded.compare(name, tmp_path)
    assert not found, f"{len(found)} fields differ ({strict}):\n" + "\n".join(found[:MOST_LINES])


def test_a_difference_is_told_with_its_run_field_and_values() -> None:
    expected = {"steps/1/loss": 2.0, "steps/1/grad_norm": 1.0, "tensors/adapter/file/a": "12", "tensors/model/b": "34"}
    found = {"steps/1/loss": 2.003, "steps/1/grad_norm": 1.5, "tensors/adapter/file/a": "56", "tensors/model/c": "34"}
    names = [
        "spt: tensors/model/b: expected '34', found 'no such field'",
        "spt: tensors/model/c: expected 'no such field', found '34'",
    ]
    assert recorded.differences("spt", expected, found, "names") == names
    assert recorded.differences("spt", expected, found, "numbers") == names
    assert recorded.differences("spt", expected, found, "bits") == [
        "spt: steps/1/loss: expected 2.0, found 2.003",
        "spt: steps/1/grad_norm: expected 1.0, found 1.5",
        "spt: tensors/adapter/file/a: expected '12', found '56'",
        *names,
    ]
    assert recorded.differences("spt", expected, expected | {"steps/1/loss": 2.01}, "numbers") == [
        "spt: steps/1/loss: expected 2.0, found 2.01"
    ]


def test_bits_are_compared_on_the_recorded_machine_only() -> None:
    here = recorded.this_machine()
    other_torch = here | {"versions": here["versions"] | {"torch": "0"}}
    other_python = here | {"versions": here["versions"] | {"python": "0"}}
    spt, classify = recorded.RUNS["spt"], recorded.RUNS["classify"]
    assert recorded.strictness(spt, here, recorded.this_machine()) == "bits"
    assert recorded.strictness(spt, other_torch, here) == "numbers"
    assert recorded.strictness(spt, other_python, here) == "names"  # another standard library is another text
    assert recorded.strictness(classify, other_python, here) == "numbers"
