"""finetune() and preview(): what a run records and writes for every task, and what it refuses to begin."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from sparsetrain.hf.model.io import load
from sparsetrain.hf.study.preview import preview
from sparsetrain.hf.train.evaluate import evaluate
from sparsetrain.hf.train.finetune import Result, finetune
from sparsetrain.measure import load_report
from sparsetrain.runs.quality import Quality
from tests.hf import runs


def losses(result: Result) -> list[float | None]:
    return [row["loss"] for row in result.run["steps"]]


def test_a_sparse_run_is_on_record_from_dense_to_trained(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    recipe = runs.recipe(tmp_path, methods=[runs.CLUSTERED], steps=30, dtype="fp32")
    result = finetune(recipe, report=events.append)
    stages = result.run["perplexity"]
    assert list(stages) == ["dense", "after_conversion", "after_training"]
    assert stages["after_training"] < 0.95 * stages["after_conversion"]  # type: ignore[operator]
    assert [point["step"] for point in result.run["evals"]] == [0, 30]
    assert len(result.run["steps"]) == 30 and losses(result)[-1] < losses(result)[0]  # type: ignore[operator]
    assert result.run["setup_s"] > 0 and result.run["peak_rss_bytes"] > 2**26
    assert result.run["saved_activation_bytes"]["ffn"] > 0 and result.run["static_bytes"]["optimizer_trainable"] > 0
    assert [row["site"] for row in result.plan] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert {event["event"] for event in events} >= {"phase", "quality", "step", "saved"}

    output = tmp_path / "out"
    stored = json.loads((output / "result.json").read_text())
    assert stored["run"]["perplexity"] == stages and stored["kind"] == "sparse"
    report = load_report(output / "report.json")
    assert list(report["runs"]) == ["sparse"] and (output / "report.html").stat().st_size > 1000
    assert type(recipe).from_yaml(output / "recipe.yaml") == recipe


def test_distillation_is_a_stage_on_record(tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path, methods=[runs.CLUSTERED], distill_steps=20, distill_lr=3e-3)
    events: list[dict[str, Any]] = []
    run = finetune(recipe, report=events.append).run
    stages = run["perplexity"]
    assert list(stages) == ["dense", "after_conversion", "after_distillation", "after_training"]
    assert stages["after_distillation"] != stages["after_conversion"]
    assert [point["step"] for point in run["evals"]] == [0, 6]
    assert run["evals"][0]["perplexity"] == stages["after_distillation"]
    assert "After distillation" in (tmp_path / "out" / "report.html").read_text()
    shares = [event["share"] for event in events if event.get("name") == "routed_ffn: distilling"]
    assert shares == [i / 20 for i in range(20)]
    assert finetune(recipe.model_copy(update={"output": str(tmp_path / "again")}), write=False).run["evals"] == [
        {**point, "wall_s": pytest.approx(point["wall_s"], abs=1e9)} for point in run["evals"]
    ]


def test_distillation_needs_a_routed_ffn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="distill_steps=5 needs a routed_ffn"):
        runs.recipe(tmp_path, methods=[runs.PQ], distill_steps=5)


def test_the_base_weights_stay_and_what_we_added_is_trained(tmp_path: Path) -> None:
    result = finetune(runs.recipe(tmp_path, methods=[runs.ROUTED]), write=False)
    adapter = load_file(result.saved / "adapter_model.safetensors")
    assert sum("router.weight" in key for key in adapter) == runs.LAYERS
    assert not any("embed_tokens" in key or "lm_head" in key for key in adapter)
    rank_four = 4 * (runs.HIDDEN + runs.FFN) * 3 + 4 * (runs.HIDDEN * 6 + runs.HIDDEN // 2 * 2)
    routers = 4 * runs.HIDDEN + 4
    assert result.trainable_parameters == runs.LAYERS * (rank_four + routers)


@pytest.mark.parametrize("methods", [[], [runs.ROUTED]])
def test_all_weights_are_trained_with_rank_zero(tmp_path: Path, methods: list[Any]) -> None:
    result = finetune(runs.recipe(tmp_path, lora_r=0, methods=methods), write=False)
    assert result.trainable_parameters == result.parameters and result.saved.name == "model"
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = load_file(result.saved / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[key], after[key]) for key in before)


def test_evaluating_on_the_way_changes_no_loss(tmp_path: Path) -> None:
    plain = finetune(runs.recipe(tmp_path, output=str(tmp_path / "a")), write=False)
    often = finetune(runs.recipe(tmp_path, output=str(tmp_path / "b"), eval_every=2), write=False)
    assert losses(plain) == losses(often)
    assert [point["step"] for point in often.run["evals"]] == [0, 2, 4, 6]
    assert often.run["evals"][1]["wall_s"] == often.run["steps"][1]["wall_s"]


@pytest.mark.parametrize("how", ["non-reentrant", "reentrant"])
def test_gradient_checkpointing_changes_no_loss(tmp_path: Path, how: str) -> None:
    methods = [runs.ROUTED]
    plain = finetune(runs.recipe(tmp_path, output=str(tmp_path / "a"), methods=methods), write=False)
    again = finetune(
        runs.recipe(tmp_path, output=str(tmp_path / "b"), methods=methods, gradient_checkpointing=how), write=False
    )
    assert losses(again) == pytest.approx(losses(plain), rel=1e-5)
    saved = [sum(result.run["saved_activation_bytes"].values()) for result in (plain, again)]
    assert saved[1] < saved[0]


def test_exact_tools_change_no_loss_and_say_where_they_do_nothing(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    plain = finetune(runs.recipe(tmp_path, output=str(tmp_path / "a"), dtype="fp32"), write=False)
    tools = {"gradient_checkpointing": "non-reentrant", "activation_offloading": True, "tiled_mlp": 4}
    exact = finetune(
        runs.recipe(tmp_path, output=str(tmp_path / "b"), dtype="fp32", **tools), report=events.append, write=False
    )
    assert losses(exact) == pytest.approx(losses(plain), rel=1e-5)
    told = [event["text"] for event in events if event["event"] == "note"]
    assert any("activation_offloading does nothing here" in text for text in told)
    saved = [sum(run.run["saved_activation_bytes"].values()) for run in (plain, exact)]
    assert saved[1] < 0.5 * saved[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tiled_mlp": 4, "methods": [runs.ROUTED]}, "tiled_mlp=4 cannot be: routed_ffn edits"),
        ({"lora_dtype": "bf16"}, "lora_dtype=bf16 goes with a model in bf16"),
    ],
)
def test_an_exact_tool_that_cannot_be_is_refused_before_weights_are_read(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        finetune(runs.recipe(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


def test_dense_and_sparse_runs_start_alike_on_the_same_rows(tmp_path: Path) -> None:
    dense = finetune(runs.recipe(tmp_path, output=str(tmp_path / "a")), write=False)
    full = {"method": "routed_ffn", "num_blocks": 4, "num_active": 4}
    sparse = finetune(runs.recipe(tmp_path, output=str(tmp_path / "b"), methods=[full]), write=False)
    assert dense.data_order == sparse.data_order
    assert losses(sparse) == losses(dense)  # everything kept is the dense model, LoRA's start included


def test_a_known_dense_quality_is_not_measured_again(tmp_path: Path) -> None:
    known = Quality(loss=1.0, metrics={"perplexity": 2.5}, metric="perplexity", tokens=1, rows=1)
    result = finetune(runs.recipe(tmp_path), dense_quality=known, write=False)
    assert result.run["perplexity"]["dense"] == 2.5


def labelled(path: Path, rows: int = 120) -> Path:
    """Texts that hold `sun` (day) or `moon` (night)."""
    draw = random.Random(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(rows):
            words = [draw.choice(["red", "green", "blue", "runs", "sits", "over", "the"]) for _ in range(8)]
            words[draw.randrange(8)] = "sun" if i % 2 else "moon"
            writer.writerow([" ".join(words), "day" if i % 2 else "night"])
    return path


def test_a_pattern_reaches_as_far_as_the_longest_row(tmp_path: Path) -> None:
    """Wherever in the data that row lies."""
    data = labelled(tmp_path / "day.csv")
    with data.open("a") as file:
        file.write(" ".join(["red"] * 30) + " sun,day\n")
    runs.llama(tmp_path / "model")
    flood = {"method": "flood_fill_attention", "block_tokens": 8, "keep_ratio": 0.5, "max_dense_steps": 0}
    changes = {"data": str(data), "task": "classify", "seq_len": 64, "batch_size": 8, "save_every": 0}
    changes |= {"methods": [flood], "calibration_tokens": 128, "epochs": 1.0, "steps": None}
    result = finetune(runs.recipe(tmp_path, **changes), write=False)
    assert "after_training" in result.run["accuracy"]


@pytest.mark.parametrize("build", [runs.bert, runs.llama])
def test_a_classifier_learns_and_loads_with_its_head(tmp_path: Path, build: Any) -> None:
    build(tmp_path / "model")
    recipe = runs.recipe(
        tmp_path,
        data=str(labelled(tmp_path / "day.csv")),
        task="classify",
        methods=[runs.ROUTED],
        seq_len=16,
        batch_size=8,
        steps=60,
        lr=1e-2,
        calibration_tokens=128,
        save_every=0,
    )
    result = finetune(recipe, write=False)
    accuracy = result.run["accuracy"]
    assert accuracy["after_training"] == 1.0 > accuracy["dense"]  # type: ignore[operator]
    loaded = load(tmp_path / "out")
    assert loaded.task == "classify" and loaded.model.config.id2label == {0: "day", 1: "night"}
    ids = loaded.tokenizer("the moon sits over the red", return_tensors="pt")
    assert loaded.model(**ids).logits.argmax(-1).item() == 1


def test_completions_alone_are_learned_in_sft(tmp_path: Path) -> None:
    draw = random.Random(0)
    with (tmp_path / "pairs.jsonl").open("w") as file:
        for _ in range(60):
            colour = draw.choice(["red", "green", "blue"])
            file.write(json.dumps({"prompt": f"the {colour} sun", "completion": f" runs {colour} ."}) + "\n")
    recipe = runs.recipe(
        tmp_path, data=str(tmp_path / "pairs.jsonl"), task="sft", seq_len=32, batch_size=4, steps=40, save_every=0
    )
    result = finetune(recipe, write=False)
    stages = result.run["perplexity"]
    assert stages["after_training"] < 0.5 * stages["dense"]  # type: ignore[operator]
    assert all(row["tokens"] <= 4 * 8 for row in result.run["steps"])  # padding is not counted


def no_model(folder: Path) -> dict[str, Any]:
    return {"model": str(folder / "nothing")}


def long_rows(folder: Path) -> dict[str, Any]:
    return {"seq_len": runs.CONTEXT + 1}


def empty_data(folder: Path) -> dict[str, Any]:
    (folder / "empty").mkdir()
    return {"data": str(folder / "empty")}


def cut_weights(folder: Path) -> dict[str, Any]:
    path = runs.llama(folder / "cut") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return {"model": str(folder / "cut")}


def experts(folder: Path) -> dict[str, Any]:
    config = MixtralConfig(
        vocab_size=19, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, max_position_embeddings=128,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder / "moe")
    runs.tokenizer().save_pretrained(folder / "moe")
    return {"model": str(folder / "moe"), "methods": [runs.ROUTED]}


def two_on_one(folder: Path) -> dict[str, Any]:
    return {"methods": [runs.ROUTED, runs.ROUTED | {"layers": [1]}]}


def no_match(folder: Path) -> dict[str, Any]:
    return {"methods": [runs.ROUTED | {"targets": ["encoder.*"]}]}


def odd_blocks(folder: Path) -> dict[str, Any]:
    return {"methods": [runs.ROUTED | {"num_blocks": 5}]}


def odd_heads(folder: Path) -> dict[str, Any]:
    runs.llama(folder / "odd", head_dim=12)
    return {"model": str(folder / "odd"), "methods": [runs.PQ]}


def no_gpu(folder: Path) -> dict[str, Any]:
    return {"device": "cuda:7"}


def used_output(folder: Path) -> dict[str, Any]:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.txt").write_text("precious")
    return {}


def encoder(folder: Path) -> dict[str, Any]:
    runs.bert(folder / "bert")
    return {"model": str(folder / "bert"), "task": "lm"}


MISTAKES = {
    no_model: "not an embedded asset, not a local folder",
    long_rows: "seq_len=129 is longer than the context.*128 tokens",
    empty_data: "empty",
    cut_weights: "cut.*model.safetensors cannot be read as safetensors",
    experts: "mixture of experts",
    two_on_one: "both claim",
    no_match: "matches nothing",
    odd_blocks: "do not divide into num_blocks=5",
    odd_heads: "head width 12 is not divisible by 8",
    no_gpu: "cuda:7",
    used_output: r"not empty.*thesis\.txt",
}


@pytest.mark.parametrize("mistake", list(MISTAKES), ids=lambda mistake: mistake.__name__)
def test_mistakes_are_clear_and_nothing_is_written(tmp_path: Path, mistake: Any) -> None:
    recipe = runs.recipe(tmp_path, **mistake(tmp_path))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="(?s)" + MISTAKES[mistake]):
        finetune(recipe)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_preview_needs_no_weights_and_writes_nothing(tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path, methods=[runs.CLUSTERED], epochs=1.5, batch_size=1, grad_accum=4)
    (tmp_path / "model" / "model.safetensors").unlink()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    shown = preview(recipe)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert shown.tokens_per_step == 256 and shown.plan is not None and len(shown.plan.edits) == 2
    text = "\n".join(shown.lines())
    assert "LoRA of rank 4" in text and "model.layers.1.mlp" in text and f"{shown.steps} steps of 256 tokens" in text


def test_a_preview_counts_what_a_run_trains(tmp_path: Path) -> None:
    for name, changes in {"a": {"methods": [runs.CLUSTERED]}, "b": {"lora_r": 0}, "c": {}}.items():
        recipe = runs.recipe(tmp_path, output=str(tmp_path / name), **changes)
        shown, result = preview(recipe), finetune(recipe, write=False)
        assert shown.trainable_parameters == result.trainable_parameters
        assert shown.parameters == result.parameters
        assert shown.optimizer_bytes == pytest.approx(result.run["static_bytes"]["optimizer_trainable"], rel=0.02)


def test_attention_dropout_is_off_where_attention_is_sparse_and_said_so(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=19, n_embd=32, n_layer=2, n_head=4, n_positions=128, attn_pdrop=0.1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    runs.tokenizer().save_pretrained(tmp_path / "model")
    notes: list[str] = []

    def tell(event: dict[str, Any]) -> None:
        notes.extend([event["text"]] if event["event"] == "note" else [])

    preview(runs.recipe(tmp_path, methods=[runs.ROUTED]), report=tell)
    assert not any("attn_pdrop" in note for note in notes)
    preview(runs.recipe(tmp_path, methods=[runs.PQ]), report=tell)
    assert any("attn_pdrop 0.1 -> 0" in note for note in notes)


def test_perplexity_is_exact_over_targets_and_leaves_the_mode(tmp_path: Path) -> None:
    runs.recipe(tmp_path)
    loaded = load(tmp_path / "model", trainable=True)
    from datasets import Dataset

    rows = Dataset.from_list([{"input_ids": [4, 5, 6, 7], "labels": [-100, -100, 6, 7]}, {"input_ids": [8, 9, 10, 11],
                              "labels": [-100, 9, 10, 11]}])  # fmt: skip

    def collate(picked: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {key: torch.tensor([row[key] for row in picked]) for key in picked[0]}

    quality = evaluate(loaded.model, rows, collate, batch_size=2)
    assert loaded.model.training
    batch = collate([rows[0], rows[1]])
    with torch.no_grad():
        expected = loaded.model.eval()(**batch).loss.item()  # the model's own mean over the five targets
    assert quality.loss == pytest.approx(expected, rel=1e-5) and quality.tokens == 8
    assert evaluate(loaded.model, rows, collate, max_tokens=1).rows == 1
    with pytest.raises(ValueError, match="no held-out rows"):
        evaluate(loaded.model, Dataset.from_list([]), collate)
