"""`sparsetrain pretrain`: trained, measured again, exported; and its refusals as one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Call

TINY = ("--model", "gpt2-nano", "--set", "n_layer=2", "--set", "n_embd=32", "--seq-len", 64, "--batch-size", 2)
SHORT = ("--steps", 3, "--eval-tokens", 512, "--device", "cpu", "--save-every", 2)


def test_trained_measured_again_and_exported(call: Call, text: Path, tmp_path: Path) -> None:
    method = ("--method", "semi_structured:refresh_every=1")
    done = call("pretrain", *TINY, *SHORT, "--data", text, *method, "--output", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    again = json.loads(call("eval", tmp_path / "run", "--json").out)
    assert again["perplexity"] == pytest.approx(answer["run"]["perplexity"]["after_training"], rel=1e-6)
    assert again["sparse"] and again["task"] == "lm"
    assert call("export", tmp_path / "run", "--output", tmp_path / "exported").code == 0
    assert (tmp_path / "exported" / "model.safetensors").is_file()


def test_refusals_are_one_line(call: Call, text: Path, tmp_path: Path) -> None:
    for flags, word in (
        (("--model", "gpt2-nan"), "Did you mean"),
        (("--model", "vit-nano"), "reads images"),
        ((*TINY, "--set", "n_hed=2"), "n_head"),
        ((*TINY, "--seq-len", 4096), "positions"),
    ):
        refused = call("pretrain", *flags, "--data", text, "--output", tmp_path / "run")
        assert refused.code == 2 and word in refused.err, refused.err
    slip = call("pretrain", "--model", "sequence-encoder", "--task", "classify", "--data", "listop")
    assert slip.code == 2 and "Did you mean 'listops'" in slip.err
    assert not (tmp_path / "run").exists()


def test_a_growing_model_is_trained_and_its_bad_plans_are_refused(call: Call, text: Path, tmp_path: Path) -> None:
    steps = ("--steps", 8, "--eval-tokens", 512, "--device", "cpu", "--data", text)
    method = "masked_growth:plan=hidden/2 heads/2 layers/2|hidden*2 heads*2 layers*2,ramp_ratio=0.25"
    done = call("pretrain", *TINY, *steps, "--method", method, "--output", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    stages = json.loads(done.out)["run"]["stages"]
    assert [(stage["from_step"], stage["to_step"]) for stage in stages] == [(0, 4), (4, 6), (6, 8)]
    assert all(cost["planned"]["time_s"] > 0 for cost in json.loads(done.out)["run"]["stage_costs"])
    assert not json.loads(call("eval", tmp_path / "run", "--json").out)["sparse"]
    for plan, word in (
        ("width/2|width*2", "unknown axis 'width'"),
        ("layers/3|layers*3", "plan asks for layers/3, and layers is 2 there"),
        ("layers/2", "plan ends with layers=1"),
        ("hidden/2|hidden*2", "Their size cannot grow"),
        ("layers", "Write sizes as"),
    ):
        refused = call(
            "pretrain", *TINY, *steps, "--method", f"masked_growth:plan={plan}", "--output", tmp_path / "bad"
        )
        assert refused.code == 2 and word in refused.err, refused.err
    assert not (tmp_path / "bad").exists()
