"""finetune, eval, export, plan and methods, end to end on the tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sparsetrain.cli.answer import Answer
from tests.cli.conftest import Call, save_llama

SPARSE = "routed_ffn:num_blocks=4,num_active=2"


def flags(llama: Path, text: Path, output: Path) -> list[object]:
    sizes = ["--seq-len", 32, "--steps", 2, "--eval-tokens", 128, "--threads", 1]
    return ["--model", llama, "--data", text, "--output", output, *sizes]


@pytest.fixture(scope="session")
def trained(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of the installed command."""
    output = tmp_path_factory.mktemp("runs") / "run"
    command = [sys.executable, "-m", "sparsetrain.cli", "finetune", *flags(llama, text, output), "--method", SPARSE]
    command += ["--deploy", "sparse"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout and f"{output}/report.html" in done.stdout
    assert "step 1/2: loss" in done.stderr and "tokens/s" in done.stderr and "MiB" in done.stderr
    return output


def test_a_run_writes_what_it_promises(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"adapter", "recipe.yaml", "result.json", "report.json", "report.html"} <= names
    recipe = yaml.safe_load((trained / "recipe.yaml").read_text())
    assert recipe["seq_len"] == 32 and recipe["methods"][0]["method"] == "routed_ffn"


def test_eval_repeats_the_run_s_own_number(call: Call, trained: Path, llama: Path, text: Path) -> None:
    run = json.loads((trained / "result.json").read_text())["run"]["perplexity"]
    sizes = ("--data", text, "--seq-len", 32, "--eval-tokens", 128, "--json")
    sparse = call("eval", trained, *sizes).json
    assert sparse["sparse"] and sparse["perplexity"] == pytest.approx(run["after_training"], rel=1e-5)
    assert call("eval", trained, "--json").json["perplexity"] == sparse["perplexity"]  # by the run's own recipe
    dense = call("eval", llama, *sizes).json
    assert not dense["sparse"] and dense["perplexity"] == pytest.approx(run["dense"], rel=1e-5)
    everything = call("eval", llama, *sizes, "--all").json
    assert everything["part"] == "all" and everything["perplexity"] != dense["perplexity"]


def test_export_keeps_the_outputs(call: Call, trained: Path, text: Path, tmp_path: Path) -> None:
    sizes = ("--data", text, "--seq-len", 32, "--eval-tokens", 128, "--json")
    before = call("eval", trained, *sizes).json["perplexity"]
    assert call("export", trained, "--output", tmp_path / "full").code == 0
    assert call("export", trained, "--output", tmp_path / "adapter", "--keep-lora").code == 0
    assert not list((tmp_path / "full").glob("adapter*")) and list((tmp_path / "adapter").glob("adapter_model*"))
    for name in ("full", "adapter"):
        again = call("eval", tmp_path / name, *sizes).json
        assert again["sparse"] and again["perplexity"] == pytest.approx(before, rel=1e-4), name


def test_export_refusals_write_nothing(call: Call, trained: Path, llama: Path, tmp_path: Path) -> None:
    dense = call("export", trained, "--output", tmp_path / "a", "--format", "dense")
    assert dense.code == 2 and "cannot be merged" in dense.err
    assert "gguf" in call("export", trained, "--output", tmp_path / "b", "--format", "gguf").err
    assert call("export", llama, "--output", tmp_path / "c", "--keep-lora").code == 2
    assert call("export", tmp_path / "nowhere", "--output", tmp_path / "d").code == 2
    assert not [name for name in "abcd" if (tmp_path / name).exists()]
    full = call("export", llama, "--output", trained)
    assert full.code == 2 and "not empty" in full.err


def test_the_result_is_the_only_thing_on_stdout(call: Call, llama: Path, text: Path, tmp_path: Path) -> None:
    result = call("finetune", *flags(llama, text, tmp_path / "run"), "--preset", "dense", "--json")
    data = result.json
    assert result.code == 0 and data["ok"] and data["kind"] == "dense" and len(data["run"]["steps"]) == 2
    assert data["saved"] == str(tmp_path / "run" / "adapter") and "step 2/2" in result.err


def test_dry_run_checks_everything_and_writes_nothing(call: Call, llama: Path, text: Path, tmp_path: Path) -> None:
    result = call("finetune", *flags(llama, text, tmp_path / "run"), "--method", SPARSE, "--dry-run")
    assert result.code == 0 and not (tmp_path / "run").exists()
    assert "model.layers.1.mlp" in result.out and "2 steps" in result.out and "seq_len: 32" in result.out
    data = call("finetune", *flags(llama, text, tmp_path / "run"), "--dry-run", "--preset", "dense", "--json").json
    assert data["dry_run"] and data["plan"] == [] and data["data"]["train_rows"] > 0


def test_flags_win_over_the_recipe(call: Call, llama: Path, text: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "run.yaml"
    values = {"model": str(llama), "data": str(text), "seq_len": 64, "steps": 9, "lr": 1e-3}
    methods = [{"method": "routed_ffn", "num_blocks": 8}, {"method": "pq_attention", "keep_ratio": 0.5}]
    recipe.write_text(yaml.safe_dump({**values, "methods": methods}))

    def resolved(*more: object) -> dict:
        arguments = ("--recipe", recipe, "--output", tmp_path / "run", "--dry-run", "--json")
        return call("finetune", *arguments, *more).json["recipe"]

    own = resolved()
    assert own["lr"] == 1e-3 and own["steps"] == 9 and len(own["methods"]) == 2
    changed = resolved("--epochs", 2, "--method", SPARSE, "--lora-targets", "q_proj, v_proj")
    assert changed["epochs"] == 2 and changed["steps"] is None and changed["lr"] == 1e-3
    assert [entry["method"] for entry in changed["methods"]] == ["routed_ffn"]
    assert changed["lora_targets"] == ["q_proj", "v_proj"]
    assert resolved("--preset", "dense")["methods"] == []


def test_sft_and_classify(call: Call, llama: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"add {i} and {i + 1}", "completion": str(2 * i + 1)} for i in range(60)]
    (tmp_path / "sft.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    lines = [f"{'good' if i % 2 else 'bad'} thing number {i},{'yes' if i % 2 else 'no'}" for i in range(60)]
    (tmp_path / "labels.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    for task, data, metric in (("sft", "sft.jsonl", "perplexity"), ("classify", "labels.csv", "accuracy")):
        output = tmp_path / task
        common = flags(llama, tmp_path / data, output)
        result = call("finetune", *common, "--task", task, "--method", SPARSE, "--json")
        assert result.code == 0, result.err
        value = result.json["run"][metric]["after_training"]
        sizes = ("--data", tmp_path / data, "--seq-len", 32, "--eval-tokens", 128, "--json")
        measured = call("eval", output, *sizes).json
        assert measured["task"] == task and measured[metric] == pytest.approx(value, rel=1e-5)
    (tmp_path / "other.csv").write_text("text,label\na b,up\nc d,down\ne f,up\ng h,down\n")
    other = call("eval", tmp_path / "classify", "--data", tmp_path / "other.csv", "--seq-len", 32, "--all")
    assert other.code == 2 and "up" in other.err and "yes" in other.err


def test_a_plan_of_a_model_alone_is_what_fits(call: Call, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It showed where SPT's modules would go, which nobody had asked for."""
    asked: list[bool] = []

    def predicted(_values: object, _goal: object, *, given_methods: bool) -> Answer:
        asked.append(given_methods)
        return Answer(data={})

    monkeypatch.setattr("sparsetrain.cli.plan.predicted", predicted)
    for more in ([], ["--preset", "auto"], ["--seq-len", 64]):
        assert call("plan", "--model", llama, *more).code == 0
    assert call("plan", "--model", llama, "--seq-len", 64, "--method", SPARSE).code == 0
    assert asked == [False] * 3


@pytest.mark.slow
def test_compare_dense(call: Call, llama: Path, text: Path, tmp_path: Path) -> None:
    common = flags(llama, text, tmp_path / "run")
    result = call("finetune", *common, "--method", SPARSE, "--compare", "dense", "--json")
    assert result.code == 0, result.err
    assert set(result.json["report"]["runs"]) == {"sparse", "dense"} and result.json["report"]["judgements"]
    assert (tmp_path / "run" / "report.html").exists()
    assert call("eval", tmp_path / "run" / "sparse", "--data", text, "--seq-len", 32).code == 0


def test_plan(call: Call, llama: Path, tmp_path: Path) -> None:
    result = call("plan", "--model", llama, "--seq-len", 64, "--method", SPARSE, "--json")
    assert [edit["site"] for edit in result.json["edits"]] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    totals = result.json["totals"]
    assert totals["mflop_after"] < totals["mflop_before"]
    shown = call(
        "plan", "--model", llama, "--seq-len", 64, "--method", f"{SPARSE},layers=1", "--method", "pq_attention"
    )
    assert "2 x model.layers.*.self_attn" in shown.out and "all of these" in shown.out
    assert "Left dense by routed_ffn: 1 of its sites." in shown.out
    assert call("plan", "--model", llama, "--preset", "dense").code == 2
    weights = save_llama(tmp_path / "no-weights") / "model.safetensors"
    weights.unlink()
    assert call("plan", "--model", tmp_path / "no-weights", "--seq-len", 64, "--method", SPARSE).code == 0


def test_methods(call: Call) -> None:
    data = call("methods", "--json").json["methods"]
    assert {"pq_attention", "routed_ffn"} <= set(data) and data["routed_ffn"]["keys"]["num_blocks"] == 4
    shown = call("methods", "routed_ffn").out
    assert "num_active" in shown and "pq_attention" not in shown and "layers=0|2|5-9" in shown
    unknown = call("methods", "routed_fnn")
    assert unknown.code == 2 and "Did you mean 'routed_ffn'?" in unknown.err
