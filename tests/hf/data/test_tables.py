"""Parquet and packed files: the same rows as the plain ones, splits and subsets as the hub has them, and refusals."""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from sparsetrain.hf.data import load_classify, load_sft, load_text
from tests.hf.data.files import CHAT, byte_tokenizer, write_jsonl

TEXTS = [{"text": f"text {i} " + "abc " * 10} for i in range(20)]
LABELLED = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)]
TALKS = [{"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a" * i}],
          "tools": None} for i in range(1, 20)]  # fmt: skip

_gzip = functools.partial(gzip.compress, mtime=0)  # of the content alone: cases are named by it


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.builder.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def packed(path: Path, content: str) -> Path:
    path.write_bytes(_gzip(content.encode()))
    return path


@pytest.mark.parametrize(("load", "rows"), [(load_text, TEXTS), (load_classify, LABELLED), (load_sft, TALKS)])
def test_every_kind_of_file_gives_the_same_rows(load: Any, rows: list[dict[str, Any]], tmp_path: Path):
    tokenizer = byte_tokenizer(chat_template=CHAT)
    lines = write_jsonl(tmp_path / "a.jsonl", rows)
    sources = [
        packed(tmp_path / "b.jsonl.gz", lines.read_text()),
        packed(tmp_path / "c.json.GZ", json.dumps(rows)),
        write_parquet(tmp_path / "d [1]*.parquet", rows),
        write_parquet(tmp_path / "folder" / "rows.parquet", rows).parent,
    ]
    if load is not load_sft:
        columns = list(rows[0])
        table = "\n".join([",".join(columns), *(",".join(row.values()) for row in rows)])
        sources.append(packed(tmp_path / "e.csv.gz", table))
    plain = load(lines, tokenizer, 64, eval_ratio=0)
    for source in sources:
        found = load(source, tokenizer, 64, eval_ratio=0)
        assert found.train["input_ids"][:] == plain.train["input_ids"][:], source
        assert found.train["labels"][:] == plain.train["labels"][:] and found.counts == plain.counts


def test_a_packed_text_is_a_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    (tmp_path / "a.txt").write_text("abc " * 50)
    plain = load_text(tmp_path / "a.txt", tokenizer, 16)
    found = load_text(packed(tmp_path / "b.txt.gz", "abc " * 50), tokenizer, 16)
    assert found.train["input_ids"][:] == plain.train["input_ids"][:] and plain.eval is not None
    assert found.eval is not None and found.eval["input_ids"][:] == plain.eval["input_ids"][:]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl.gz", _gzip(b'{"text": "a"}\n{"text": 3}\n'), r"a\.jsonl\.gz:2: 'text' is int"),
        ("a.csv.gz", _gzip(b"text,n\na,1\nb,c,2\n"), r"a\.csv\.gz:3 has 3 fields"),
        (
            "a.txt.gz",
            _gzip(b"a" * 9000)[:-20],
            r"a\.txt\.gz is to be compressed by gzip, and cannot be unpacked: .*ended",
        ),
        (
            "a.txt.gz",
            b"plain text",
            r"a\.txt\.gz is to be compressed by gzip, and cannot be unpacked: Not a gzipped file",
        ),
        ("a.txt.gz", _gzip(b""), r"a\.txt\.gz is empty"),
        ("a.txt.gz", _gzip(_gzip(b"a")), r"a\.txt\.gz is compressed by gzip"),
        ("a.parquet", b"PAR1 and nothing else", r"a\.parquet is no whole Parquet file"),
        ("a.parquet", b"", r"a\.parquet is no whole Parquet file"),
    ],
)
def test_broken_files_are_named(
    name: str, content: bytes, words: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load_text(tmp_path / name, tokenizer, 16)


def test_a_packed_file_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    path = packed(tmp_path / "a.json.gz", json.dumps([{"text": "a" * 5000}]))
    monkeypatch.setattr("sparsetrain.data.rows.MOST_JSON_BYTES", 1000)
    assert path.stat().st_size < 1000
    with pytest.raises(ValueError, match=r"a\.json\.gz has .* a file that is read whole"):
        load_text(path, tokenizer, 16)


def test_splits_and_subsets_of_a_local_copy(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    for subset in ("de", "en"):
        for split, count in (("train", 6), ("test", 3)):
            rows = [{"text": f"{subset} {split} {i} " * 4} for i in range(count)]
            write_parquet(tmp_path / "copy" / subset / f"{split}-00000-of-00001.parquet", rows)
    copy = tmp_path / "copy"
    (copy / "en" / "README.md").write_text("# A copy\n")
    bundle = load_text(copy, tokenizer, 16, dataset_config="en", eval_split="test")
    assert bundle.counts["documents"] == 6 and bundle.eval is not None
    read = [
        tokenizer.decode([token for row in side["input_ids"] for token in row]) for side in (bundle.train, bundle.eval)
    ]
    assert "en train" in read[0] and "test" not in read[0] and "de" not in read[0] and "en test" in read[1]
    assert load_text(copy / "de", tokenizer, 16, split="train[:2]", eval_ratio=0).counts["documents"] == 2
    with pytest.raises(ValueError, match=r"has no split 'valid'\. Found: train, test"):
        load_text(copy / "de", tokenizer, 16, split="valid")
    with pytest.raises(ValueError, match="fr does not exist"):
        load_text(copy, tokenizer, 16, dataset_config="fr")
    write_parquet(copy / "de" / "more.parquet", TEXTS)
    assert "1 Parquet files of no split not read" in load_text(copy / "de", tokenizer, 16).description


def test_tables_that_do_not_fit_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    one, other = write_parquet(tmp_path / "a.parquet", TEXTS), write_parquet(tmp_path / "b.parquet", LABELLED)
    with pytest.raises(ValueError, match=r"b\.parquet has the columns text, label; .*a\.parquet has text"):
        load_text([one, other], tokenizer, 16)
    with pytest.raises(ValueError, match=r"c\.jsonl lies among Parquet files"):
        load_text([one, write_jsonl(tmp_path / "c.jsonl", TEXTS)], tokenizer, 16)
    with pytest.raises(ValueError, match=r"a\.parquet has no 'body'\. Found: text"):
        load_text(one, tokenizer, 16, text_column="body")
    write_parquet(one, [{"text": None}, {"text": "a"}])
    with pytest.raises(ValueError, match=r"a\.parquet\[0\]: 'text' is null"):
        load_text(one, tokenizer, 16, eval_ratio=0)
    datasets.Dataset.from_dict({"text": []}).to_parquet(str(one))
    with pytest.raises(ValueError, match=r"a\.parquet has no rows"):
        load_text(one, tokenizer, 16)
    with pytest.raises(ValueError, match="is text files, which have no split 'test'"):
        load_text(tmp_path / "c.jsonl", tokenizer, 16, eval_split="test")
