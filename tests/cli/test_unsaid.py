"""`finetune` without `--task` or `--seq-len`: what model and data say is taken, and told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsetrain.cli.unsaid import settled
from tests.cli.conftest import Call, save_llama

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "max_position_embeddings": 4096},
    "short": {"model_type": "gpt2", "n_positions": 256},
    "bert": {"model_type": "bert", "max_position_embeddings": 512},
    "vit": {"model_type": "vit", "image_size": 224},
    "clip": {
        "model_type": "clip",
        "text_config": {"projection_dim": 8, "max_position_embeddings": 77},
        "vision_config": {"image_size": 224},
    },
    "llava": {
        "model_type": "llava",
        "text_config": {"model_type": "llama", "max_position_embeddings": 2048},
        "vision_config": {"model_type": "siglip_vision_model"},
    },
    "dit": {"_class_name": "DiTTransformer2DModel", "sample_size": 8},
}
ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "a"}]},
    "prompt": {"prompt": "a", "completion": "b"},
    "alpaca": {"instruction": "a", "input": "", "output": "b"},
    "question": {"question": "a", "answer": "b"},
    "text": {"text": "a"},
    "labelled": {"text": "a", "label": 1},
    "both": {"text": "a", "prompt": "a", "completion": "b"},
    "none": {"id": 1},
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name, values in CONFIGS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(values))
    for name, row in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "plain.txt").write_text("prompt completion")
    return tmp_path


@pytest.mark.parametrize(
    ("model", "data", "found"),
    [
        ("llama", "messages.jsonl", {"task": "sft"}),
        ("llama", "prompt.jsonl", {"task": "sft"}),
        ("llama", "alpaca.jsonl", {"task": "sft"}),
        ("llama", "question.jsonl", {"task": "sft"}),
        ("llava", "question.jsonl", {"task": "sft"}),
        ("llama", "text.jsonl", {}),
        ("llama", "both.jsonl", {}),
        ("llama", "labelled.jsonl", {}),
        ("llama", "none.jsonl", {}),
        ("llama", "plain.txt", {}),
        ("llama", "nothing.jsonl", {}),
        ("short", "text.jsonl", {"seq_len": 256}),
        ("bert", "labelled.jsonl", {"task": "classify", "seq_len": 512}),
        ("bert", "text.jsonl", {"seq_len": 512}),
        ("vit", "pictures", {"task": "image"}),
        ("clip", "pictures", {"task": "pair-image", "seq_len": 77}),
        ("dit", "pictures", {"task": "diffusion"}),
    ],
)
def test_what_model_and_rows_say(model: str, data: str, found: dict[str, Any], place: Path) -> None:
    (place / "pictures").mkdir()
    (place / "pictures" / "0.png").write_bytes(b"")
    given = {"model": str(place / model), "data": str(place / data)}
    settled_now, said = settled(given, None)
    assert settled_now == given | found and len(said) == len(found)


def test_what_is_said_stays(place: Path) -> None:
    given = {"model": str(place / "short"), "data": str(place / "prompt.jsonl")}
    said = given | {"task": "lm", "seq_len": 64}
    assert settled(said, None) == (said, [])
    assert settled(given | {"text_column": "prompt"}, None)[0].get("task") is None
    (place / "recipe.yaml").write_text("task: lm\nseq_len: 128\n")
    assert settled(given, place / "recipe.yaml") == (given, [])
    for model in ("owner/of-the-hub", str(place / "gone")):
        assert settled({"model": model, "data": "owner/rows"}, None)[1] == []


def test_a_table_says_it_too(place: Path) -> None:
    from datasets import Dataset, DatasetDict

    table = Dataset.from_list([ROWS["question"]] * 3)
    table.to_parquet(place / "rows.parquet")
    table.save_to_disk(place / "saved")
    DatasetDict({"train": table, "test": table}).save_to_disk(place / "divided")
    for name in ("rows.parquet", "saved", "divided"):
        assert settled({"model": str(place / "llama"), "data": str(place / name)}, None)[0]["task"] == "sft"


def test_pairs_of_question_and_answer_are_trained_on_without_a_flag(call: Call, tmp_path: Path) -> None:
    rows = [{"question": f"what is {i}?", "answer": f"it is {i}"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = save_llama(tmp_path / "llama")
    words = ("--model", model, "--data", tmp_path / "pairs.jsonl", "--output", tmp_path / "run", "--steps", 1)
    result = call("finetune", *words, "--device", "cpu", "--preset", "dense", "--json")
    assert result.code == 0, result.err
    recipe = result.json["recipe"]
    assert recipe["task"] == "sft" and recipe["seq_len"] == 128
    assert "task sft, as the rows hold answer and question" in result.err
    assert "rows of 128 tokens at most" in result.err
