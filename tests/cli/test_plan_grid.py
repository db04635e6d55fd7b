"""`sparsetrain plan --gpus`: every grid of a well-known model, its terms, and errors that say what to give."""

from __future__ import annotations

import json

import pytest

from sparsetrain.cli import run
from sparsetrain.cli.plan_grid import parse_bandwidth

LINKS = ["--gpus-per-node", "4", "--bandwidth", "node=200GB/s,inter=100GB/s"]


def test_grids_of_a_model_of_70_billion(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "--model", "llama-3-70b", "--gpus", "64", "--batch-size", "64", "--memory", "100GB", *LINKS]
    assert run([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "meta-llama/Meta-Llama-3-70B"
    task = found["task"]
    parameters = sum(layer["k"] * layer["n"] * layer["count"] for layer in task["layers"]) + task["whole_parameters"]
    assert round(parameters / 1e9, 1) == 70.6 and task["heads"] == 64 and task["kv_heads"] == 8
    assert len(found["grids"]) + len(found["refused"]) == 84
    totals = [row["total_s"] for row in found["grids"]]
    assert totals == sorted(totals) and all(row["memory_bytes"] <= 100e9 for row in found["grids"])
    assert all(row["total_s"] == pytest.approx(sum(row["seconds"].values())) for row in found["grids"])
    assert any("a rank, and 93.13 GiB are allowed" in row["why"] for row in found["refused"])


def test_the_table_says_what_is_refused_and_what_is_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--model", "llama-3.2-1b", "--gpus", "8", "--memory", "1GB", *LINKS]) == 1
    out = capsys.readouterr().out
    assert "No grid of these devices fits. Nearest: data=" in out and "GiB a rank, and 954 MiB are allowed" in out
    assert run(["plan", "--model", "llama-3.2-1b", "--gpus", "8", *LINKS]) == 0
    out = capsys.readouterr().out
    assert "1,8,1,1" in out and "AR y" in out and "are whole on every rank" in out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--gpus", "0", "--model", "llama-3-8b"], "give 1 or more"),
        (["--gpus", "8"], "--gpus needs --model"),
        (["--gpus", "8", "--model", "llama-3-8b", "--bandwidth", "fast"], "cannot read 'fast'"),
        (["--gpus", "8", "--model", "llama-3-8b", "--bandwidth", "node=1GB/s"], "lacks inter"),
    ],
)
def test_errors_say_what_to_give(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    links = [] if "--bandwidth" in given else LINKS
    assert run(["plan", *given, *links]) == 2
    assert said in capsys.readouterr().err


def test_bandwidths() -> None:
    assert parse_bandwidth("node=200GB/s, inter=1.5TB/s") == {"node": 200e9, "inter": 1.5e12}
