"""What is kept between commands: believed only if it is what was stored."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from sparsetrain.planner.machines import known_machines, machine_rates
from sparsetrain.planner.memory import Layout, StaticBytes
from sparsetrain.planner.outline import Outline, load_outline, store_outline
from sparsetrain.planner.traced_step import Segment, StepTrace


def small_outline() -> Outline:
    segment = Segment(10.0, 20.0, {"gemm": (1.0, 2.0, 3.0)})
    trace = StepTrace(
        before=segment, forward=(segment,), head=segment, backward=(segment,), saved={"norm": 5.0}, block_saved=(7.0,)
    )
    static = StaticBytes(
        parameters_trainable=1, parameters_frozen=2, buffers=3, gradients=4, optimizer=5, grads_by_block=(4,)
    )
    return Outline(
        traces={256: trace}, layout=Layout(of_block=(0,)), static=static, ops=("a",), parameters=3, trained=1
    )


def test_an_outline_comes_back_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "outlines" / "one.json"
    store_outline(small_outline(), path)
    assert load_outline(path) == small_outline()
    assert os.listdir(path.parent) == ["one.json"]
    text = path.read_text()
    altered = re.sub(r"parameters\\\": 3", r'parameters\\": 4', text)
    assert altered != text
    plain = small_outline().to_json()  # as stored before there was a checksum
    wrong = json.dumps({"sha256": 5, "outline": {"traces": []}})
    for content in (altered, plain, wrong, text[:-20], "[]", "null", "5", "", "[" * 100_000, "{" * 100_000):
        path.write_text(content)
        assert load_outline(path) is None, content[:60]
    path.unlink()
    os.mkfifo(path)
    assert load_outline(path) is None  # and does not wait for a writer


def test_a_folder_that_cannot_be_written_costs_time_alone(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store_outline(small_outline(), tmp_path / "file" / "one.json")
    assert load_outline(tmp_path / "file" / "one.json") is None


RATES = {"machine": "mine", "gemm_flops": {"fp32": 1e12}, "copy_bytes_per_s": 1e10, "attention_flops": 1e11}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"copy_bytes_per_s": "fast"}, "copy_bytes_per_s='fast'"),
        ({"copy_bytes_per_s": True}, "a finite number"),
        ({"copy_bytes_per_s": float("nan")}, "a finite number"),
        ({"attention_flops": float("inf")}, "a finite number"),
        ({"attention_flops": None}, "attention_flops=None"),
        ({"attention_flops": -1.0}, "positive"),
        ({"gemm_flops": []}, "objects"),
        ({"gemm_flops": {"fp32": "x"}}, "gemm_flops[fp32]"),
        ({"gemm_flops": {"fp8": 1e12}}, "Dtypes"),
        ({"gemm_flops": {}}, "empty"),
        ({"exp_per_s": 0}, "positive"),
        ({"exp_per_s": [1]}, "exp_per_s=[1]"),
        ({"memory_bytes": -5}, "negative"),
        ({"memory_bytes": 1.5}, "whole number"),
        ({"memory_bytes": 10**30}, "whole number"),
        ({"machine": 5}, "text"),
        ({"methods": []}, "objects"),
        ({"methods": {"routed_ffn": 5}}, "holds 5"),
        ({"methods": {"routed_ffn": [{"tokens": 0}]}}, "tokens"),
        ({"methods": {"routed_ffn": [{"tokens": 5, "step_speedup": "x"}]}}, "step_speedup"),
    ],
)
def test_rates_of_another_type(tmp_path: Path, change: dict, words: str) -> None:
    path = tmp_path / "measured.json"
    path.write_text(json.dumps(RATES | change))
    with pytest.raises(ValueError, match=re.escape(words)):
        machine_rates(str(path))


def test_rates_that_are_right(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    rows = {"routed_ffn": [{"tokens": 512, "step_speedup": None}, {"tokens": 512, "step_speedup": 1.5}]}
    path.write_text(json.dumps(RATES | {"methods": rows, "later": "key"}))
    assert machine_rates(str(path)).methods == rows
    assert len(known_machines()) >= 5


@pytest.mark.parametrize("content", ["[]", "5", '"x"', "{}", "{", "[" * 100_000, "\udcff"])
def test_files_that_hold_no_rates(tmp_path: Path, content: str) -> None:
    path = tmp_path / "measured.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"measured.json"):
        machine_rates(str(path))
