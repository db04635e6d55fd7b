"""Streamed rows: what is in memory, what follows, that nothing held out is trained on, and what can be no stream."""

from __future__ import annotations

import gzip
import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from sparsetrain.data.streams import mixed
from sparsetrain.hf.data import load_sft, load_text
from tests.hf.data.files import all_text, write_jsonl

AHEAD, ROWS = 20, 60


def pairs(count: int = ROWS) -> list[dict[str, str]]:
    return [{"prompt": f"<{i:02}>", "completion": f"[{i:02}]"} for i in range(count)]


def written(folder: Path, kind: str, rows: list[dict[str, str]]) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif kind == "csv":
        path.write_text("prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in rows))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    elif kind == "saved":
        Dataset.from_list(rows).save_to_disk(path)
    else:
        write_jsonl(path, rows)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "parquet", "saved"])
def test_a_pass_has_every_row_once_but_those_held_out(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    lines: list[str] = []
    source = written(tmp_path, kind, [*pairs(), *pairs(3)])  # the last three stand among the first, too
    bundle = load_sft(source, tokenizer, 50, eval_ratio=0.2, stream_ahead=AHEAD, progress=lines.append)
    assert bundle.counts["rows"] == AHEAD and bundle.eval is not None and bundle.stream is not None
    held_out = {all_text(tokenizer, Dataset.from_list([row])) for row in bundle.eval}
    rows = [tokenizer.decode(row["input_ids"]) for row in islice(bundle.stream, 2 * (ROWS + 3))]
    size = ROWS + 3 - len(held_out) - sum(f"<{i:02}>[{i:02}]</s>" in held_out for i in range(3))
    first, second = rows[:size], rows[size : 2 * size]
    assert len(held_out) == 4 and not held_out & set(rows)
    assert set(first) | held_out == {f"<{i:02}>[{i:02}]</s>" for i in range(ROWS)}
    assert sorted(first) == sorted(second) and first != second  # the next pass, in another order
    assert lines[0] == f"The data ended after {size:,} training rows; pass 2 begins, in another order."
    assert "streamed: these are the first 20, and others follow" in bundle.description


def test_a_stream_depends_on_source_and_seed_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source = written(tmp_path, "jsonl", pairs())

    def order(seed: int, ahead: int = AHEAD) -> list[Any]:
        made = load_sft(source, tokenizer, 50, seed=seed, stream_ahead=ahead)
        assert made.stream is not None
        return [row["input_ids"] for row in islice(made.stream, 40)]

    assert order(0) == order(0) and order(0) != order(1)


def test_rows_are_mixed_within_the_buffer() -> None:
    rows = [{"at": i} for i in range(1000)]
    order = [row["at"] for row in mixed(rows, 50, random.Random(0))]
    assert sorted(order) == list(range(1000)) and order != sorted(order)
    assert all(at - place < 50 for place, at in enumerate(order))


@pytest.mark.parametrize("pack", ["concat", "documents"])
def test_text_is_cut_into_rows_across_its_documents(
    pack: Any, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": f"<{i:03}>" + "x" * 14} for i in range(100)])
    bundle = load_text(source, tokenizer, 30, pack=pack, eval_ratio=0.1, stream_ahead=AHEAD)
    assert bundle.stream is not None and bundle.eval is not None
    rows = [row["input_ids"] for row in islice(bundle.stream, len(bundle.train) + 53)]
    text = "".join(tokenizer.decode(ids) for ids in rows)
    assert {len(row) for row in rows} == {30} and all(f"<{i:03}>" in text for i in range(AHEAD, 100))
    assert ("position_ids" in next(iter(bundle.stream))) == (pack == "documents")
    held_out = all_text(tokenizer, bundle.eval)
    assert not any(f"<{i:03}>" in text and f"<{i:03}>" in held_out for i in range(100))


def test_a_long_text_is_read_in_sections(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "long.txt"
    path.write_text("".join(f"line {i:06} of it\n" for i in range(20_000)), encoding="utf-8")
    bundle = load_text(path, tokenizer, 2000, eval_ratio=0.1, max_tokens=100_000, stream_ahead=2)
    assert bundle.counts["documents"] == 2 and bundle.stream is not None
    rows = list(islice(bundle.stream, len(bundle.train) + 110))
    text = "".join(tokenizer.decode(row["input_ids"]) for row in rows)
    assert "line 014000 of it\n" in text and {len(row["input_ids"]) for row in rows} == {2000}


def test_a_malformed_row_is_named_when_it_is_reached(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs()) + "{broken\n", encoding="utf-8")
    bundle = load_sft(path, tokenizer, 50, stream_ahead=AHEAD)
    assert bundle.stream is not None
    with pytest.raises(ValueError, match=r"a\.jsonl:61 is not JSON"):
        list(islice(bundle.stream, ROWS))


def test_what_can_be_no_stream_says_so(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    whole = tmp_path / "a.json"
    whole.write_text(json.dumps(pairs()), encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json is one JSON value, which is read whole. Write it as \.jsonl"):
        load_sft(whole, tokenizer, 50, stream_ahead=AHEAD)
    with pytest.raises(ValueError, match="chitchat comes with the package and fits into memory"):
        load_sft("chitchat", tokenizer, 50, stream_ahead=AHEAD)
    with pytest.raises(ValueError, match=r"a\.jsonl.* has no rows|a\.jsonl is empty"):
        load_text(write_jsonl(tmp_path / "a.jsonl", []), tokenizer, 50, stream_ahead=AHEAD)


def test_a_data_set_of_the_hub_is_read_row_by_row(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def load_dataset(*asked: Any, **how: Any) -> Any:
        calls.append((asked, how))
        return Dataset.from_list(pairs()).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    bundle = load_sft("org/name", tokenizer, 50, dataset_config="small", stream_ahead=AHEAD)
    assert bundle.stream is not None
    rows = {tokenizer.decode(row["input_ids"]) for row in islice(bundle.stream, ROWS - 1)}
    assert len(rows) == ROWS - 1 and bundle.counts["rows"] == AHEAD
    assert calls == [(("org/name", "small"), {"split": "train", "streaming": True})] * 2
