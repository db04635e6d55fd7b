"""Packed rows: what is trained is what separate rows would be, in fewer passes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsetrain.data.packing import pack_whole
from sparsetrain.hf.train.assemble import load_model, open_parts
from sparsetrain.hf.train.finetune import finetune
from tests.hf import runs


def pairs(path: Path, rows: int = 60) -> Path:
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(rows):
            prompt = " ".join(draw.choices(runs.WORDS, k=draw.randint(2, 9)))
            file.write(json.dumps({"prompt": prompt, "completion": f" {draw.choice(runs.WORDS)} ."}) + "\n")
    return path


def recipe(folder: Path, **changes: Any) -> Any:
    data = str(pairs(folder / "pairs.jsonl"))
    usual = {"data": data, "task": "sft", "dtype": "fp32", "save_every": 0, "steps": 3, "deploy": "dense"}
    return runs.recipe(folder, **usual | changes)


def test_rows_fit_and_none_is_lost_or_cut() -> None:
    draw = random.Random(1)
    ids = [[i] * draw.randint(1, 32) for i in range(200)]
    packed = pack_whole(ids, [[-100, *row[1:]] for row in ids], 32)
    assert sorted(token for row in packed["input_ids"] for token in row) == sorted(t for row in ids for t in row)
    tokens = sum(map(len, ids))
    assert -(-tokens // 32) <= len(packed["input_ids"]) <= 1.15 * tokens / 32
    for row, labels, places in zip(*packed.values(), strict=True):
        assert len(row) == len(labels) == len(places) <= 32
        assert all(place == (places[i - 1] + 1 if i and row[i] == row[i - 1] else 0) for i, place in enumerate(places))
        assert [label == -100 for label in labels] == [place == 0 for place in places]
    assert pack_whole([], [], 8) == {"input_ids": [], "labels": [], "position_ids": []}


@pytest.mark.parametrize("methods", [[], [runs.ROUTED | {"num_active": 4}]], ids=["dense", "routed to all"])
def test_a_packed_row_has_the_loss_of_its_rows(tmp_path: Path, methods: list[Any]) -> None:
    packed = open_parts(recipe(tmp_path, packing=True, methods=methods), lambda _event: None)
    apart = open_parts(recipe(tmp_path, steps=None, epochs=1.0, methods=methods), lambda _event: None)
    assert len(packed.bundle.train) < 0.4 * len(apart.bundle.train)
    assert "packed into" in packed.bundle.description
    losses = []
    for parts in (packed, apart):
        model, _ = load_model(parts)
        batch = parts.bundle.collate_fn(list(parts.bundle.train))
        assert ("attention_mask" in batch) == (parts is apart)
        with torch.no_grad():
            losses.append(model(**batch).loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    held_out = packed.bundle.collate_fn(list(packed.bundle.eval or ()))
    assert "attention_mask" in held_out and "position_ids" not in held_out


@pytest.mark.parametrize("methods", [[], [runs.ROUTED], [runs.PQ]], ids=["dense", "routed", "pq"])
def test_packed_rows_are_trained_on(tmp_path: Path, methods: list[Any]) -> None:
    run = finetune(recipe(tmp_path, packing=True, methods=methods, eval_every=2), write=False).run
    assert run["steps"][0]["tokens"] > 100  # 2 rows of at most 64; unpacked they have some 20
    assert run["perplexity"]["after_training"] < run["perplexity"]["dense"]  # type: ignore[operator]


def test_documents_of_a_text_see_themselves_alone(tmp_path: Path) -> None:
    data = str(runs.text(tmp_path / "short", files=80, words=20))
    losses = {}
    for packing in (False, True):
        asked = recipe(tmp_path, data=data, task="lm", packing=packing, output=str(tmp_path / f"{packing}"))
        rows = open_parts(asked, lambda _event: None).bundle.train
        assert ("position_ids" in rows.column_names) is packing
        losses[packing] = finetune(asked, write=False).run["evals"][0]["loss"]
    assert losses[True] != losses[False]
    with pytest.raises(ValueError, match="tasks that learn tokens"):
        recipe(tmp_path, task="classify", packing=True)
