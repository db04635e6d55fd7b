"""Text: rows, splits and counts on small files; every mistake names the place and the way out."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsetrain.hf import assets
from sparsetrain.hf.data import load_text
from tests.hf.data.files import BOS, EOS, all_text, byte_tokenizer, write_jsonl, write_texts


def test_text_rows_labels_and_counts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    path = tmp_path / "a.txt"
    path.write_text("héllo\r\nworld" * 10, encoding="utf-8")
    bundle = load_text(path, tokenizer, 16, eval_ratio=0)
    assert bundle.eval is None
    ids = tokenizer("héllo\nworld" * 10)["input_ids"] + [EOS]
    found = sorted(row["input_ids"] for row in bundle.train)
    assert found == sorted(ids[i : i + 16] for i in range(0, len(ids) - 15, 16))
    for row in bundle.train:
        assert row["labels"] == [-100, *row["input_ids"][1:]]
    counts = bundle.counts
    assert counts["train_tokens"] + counts["train_tokens_left_over"] == len(ids)
    assert counts["train_rows"] == len(bundle.train) and counts["train_documents"] == 1
    batch = bundle.collate_fn([bundle.train[i] for i in range(3)])
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].shape == (3, 16) and batch["labels"].dtype == torch.int64


def test_text_documents_packing_restarts_positions_and_masks_the_first_label(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
):
    folder = write_texts(tmp_path / "docs", 3, size=10)
    bundle = load_text(folder, tokenizer, 8, eval_ratio=0, pack="documents", seed=3)
    # 3 documents of 10 tokens and an end token: starts at 0, 11 and 22 of the stream of 33.
    by_start = {}
    for row in bundle.train:
        starts = [t for t, position in enumerate(row["position_ids"]) if position == 0]
        for t, position in enumerate(row["position_ids"]):
            begin = max(start for start in starts if start <= t)
            assert position == t - begin
            masked = t == 0 or (t in starts and row["input_ids"][t] == tokenizer("<")["input_ids"][0])
            assert row["labels"][t] == (-100 if masked else row["input_ids"][t])
        by_start[tuple(starts)] = by_start.get(tuple(starts), 0) + 1
    assert by_start == {(0,): 2, (0, 3): 1, (0, 6): 1}
    assert "position_ids" in bundle.collate_fn([bundle.train[0]])


def test_packed_documents_do_not_see_each_other(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    folder = write_texts(tmp_path / "docs", 2, size=10)
    bundles = {pack: load_text(folder, tokenizer, 22, eval_ratio=0, pack=pack) for pack in ("documents", "concat")}
    for pack, bundle in bundles.items():
        batch = bundle.collate_fn([bundle.train[0]])
        logits = model(**batch, use_cache=False).logits
        batch["input_ids"][0, 5] = EOS  # in the first document
        moved = (model(**batch, use_cache=False).logits - logits).abs().amax(-1)[0]
        assert moved[5:11].max() > 1e-4
        assert (moved[11:].max() == 0) == (pack == "documents")


def test_text_holds_out_whole_files_and_drops_their_copies(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    folder = write_texts(tmp_path / "docs", 20)
    for i in range(20):  # every file has a copy elsewhere
        (folder / "copy").mkdir(exist_ok=True)
        (folder / "copy" / f"{i}.txt").write_text((folder / f"{i:02}.txt").read_text(encoding="utf-8") + "\n")
    bundle = load_text(folder, tokenizer, 17, eval_ratio=0.2)
    assert bundle.eval is not None
    held_out, trained = all_text(tokenizer, bundle.eval), all_text(tokenizer, bundle.train)
    letters = {char for char in held_out if "a" <= char <= "t"} - set("s")  # 's' also stands in '</s>'
    assert letters and not any(char * 5 in trained for char in letters)
    assert bundle.counts["eval_documents"] >= 7 and bundle.counts["duplicates_of_eval"] >= 6
    total = bundle.counts["eval_documents"] + bundle.counts["train_documents"] + bundle.counts["duplicates_of_eval"]
    assert total <= bundle.counts["documents"] == 40


def test_text_is_deterministic_in_the_seed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    folder = write_texts(tmp_path / "docs", 10)
    first, again, other = (load_text(folder, tokenizer, 16, seed=seed) for seed in (1, 1, 2))
    assert first.train["input_ids"] == again.train["input_ids"]
    assert first.train["input_ids"] != other.train["input_ids"]


def test_text_of_one_file_is_cut_at_a_line(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i:03}\n" for i in range(100)), encoding="utf-8")
    bundle = load_text(path, tokenizer, 9, eval_ratio=0.1)
    assert bundle.eval is not None
    assert bundle.eval["input_ids"][0] == tokenizer("line 090\n")["input_ids"]
    assert "line 089" in all_text(tokenizer, bundle.train) and "line 090" not in all_text(tokenizer, bundle.train)


def test_text_stops_at_max_tokens(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch):
    folder = write_texts(tmp_path / "docs", 50, size=1000)
    read: list[Path] = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *mode: (read.append(path), real(path, *mode))[1])
    bundle = load_text(folder, tokenizer, 100, max_tokens=2050, max_eval_tokens=300)
    assert len(bundle.train) == 20 and bundle.counts["train_tokens_left_over"] == 50
    assert bundle.eval is not None and len(bundle.eval) == 3
    assert 0 < len(read) < 15  # of 50


def test_text_long_documents_are_tokenised_in_pieces_without_loss(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    text = "".join(f"{i} squared is {i * i}\n" for i in range(12_000)) + "x" * 70_000  # the tail has no line break
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    lines: list[str] = []
    bundle = load_text(tmp_path / "a.txt", tokenizer, 1 << 12, eval_ratio=0, pack="documents", progress=lines.append)
    ids = tokenizer(text, verbose=False)["input_ids"]
    assert len(ids) > 300_000
    starts = [row["input_ids"] for row in bundle.train]
    assert sorted(starts) == sorted(ids[i : i + 4096] for i in range(0, len(ids) - 4095, 4096))
    assert all(row["position_ids"] == list(range(4096)) for row in bundle.train)
    assert lines and "tokens" in lines[0]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "list", "glob", "saved", "saved_dict"])
def test_text_sources_agree(kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    texts = [f'document {i}, "quoted"\u2028{chr(97 + i)}' for i in range(6)]
    if kind == "jsonl":
        source: Any = write_jsonl(tmp_path / "a.jsonl", [{"body": text} for text in texts])
    elif kind in ("csv", "tsv"):
        source, mark = tmp_path / f"a.{kind}", "," if kind == "csv" else "\t"
        quoted = (text.replace('"', '""') for text in texts)
        source.write_text(f"n{mark}body\n" + "".join(f'0{mark}"{text}"\n' for text in quoted), encoding="utf-8")
    elif kind.startswith("saved"):
        source = str(tmp_path / "saved")
        table = datasets.Dataset.from_dict({"body": texts})
        datasets.DatasetDict({"train": table}).save_to_disk(source) if "dict" in kind else table.save_to_disk(source)
    else:
        for i, text in enumerate(texts):
            (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
        source = [tmp_path / f"{i}.txt" for i in range(6)] if kind == "list" else str(tmp_path / "*.txt")
    bundle = load_text(source, tokenizer, 5, eval_ratio=0, text_column="body", seed=0)
    (tmp_path / "reference").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "reference" / f"{i}.txt").write_text(text, encoding="utf-8")
    reference = load_text(tmp_path / "reference", tokenizer, 5, eval_ratio=0, seed=0)
    assert bundle.train["input_ids"] == reference.train["input_ids"]


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0b"])
def test_only_line_feeds_end_a_row(mark: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    (tmp_path / "a.csv").write_text(f"text,n\none{mark}two,1\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "one\u2028two"}\n', encoding="utf-8")
    length = len(f"one{mark}two".encode())
    bundle = load_text(tmp_path / "a.csv", tokenizer, length + 1, eval_ratio=0)
    assert bundle.train["input_ids"][0] == [*tokenizer(f"one{mark}two")["input_ids"], EOS]
    assert load_text(tmp_path / "b.jsonl", tokenizer, 10, eval_ratio=0).counts["documents"] == 1


def test_text_eval_source_and_split(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    folder = write_texts(tmp_path / "train", 5)
    other = write_texts(tmp_path / "eval", 2)  # the same texts as the first two training files
    bundle = load_text(folder, tokenizer, 20, eval_source=other)
    assert bundle.counts["duplicates_of_eval"] == 2 and bundle.counts["train_documents"] == 3
    tables = {name: datasets.Dataset.from_dict({"text": [name * 30]}) for name in ("train", "valid")}
    datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "saved"))
    bundle = load_text(str(tmp_path / "saved"), tokenizer, 20, eval_split="valid")
    assert bundle.eval is not None and "valid" in all_text(tokenizer, bundle.eval)
    with pytest.raises(ValueError, match=r"has no split 'test'. Found: train, valid"):
        load_text(str(tmp_path / "saved"), tokenizer, 20, split="test")


def test_text_hub_names_reach_the_hub(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    calls: list[Any] = []

    def load_dataset(name: str, config: str | None, split: str) -> datasets.Dataset:
        calls.append((name, config, split))
        if name == "no/such":
            raise ConnectionError("offline")
        return datasets.Dataset.from_dict({"text": ["hub text " * 10, "more text " * 10]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    bundle = load_text("org/name", tokenizer, 20, dataset_config="small", split="train[:10%]")
    assert calls == [("org/name", "small", "train[:10%]")] and bundle.counts["documents"] == 2
    with pytest.raises(ValueError, match=r"'no/such' is no local file.*ConnectionError: offline"):
        load_text("no/such", tokenizer, 20)
    with pytest.raises(ValueError, match=r"org/name has no 'body'. Found: text"):
        load_text("org/name", tokenizer, 20, text_column="body")


def test_text_begins_documents_as_the_tokenizer_does(tmp_path: Path):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    bundle = load_text(write_texts(tmp_path / "docs", 2, size=10), tokenizer, 12, eval_ratio=0)
    for row in bundle.train:
        assert row["input_ids"][0] == BOS and row["input_ids"][-1] == EOS


def test_text_empty_documents_are_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    folder = write_texts(tmp_path / "docs", 4)
    (folder / "__init__.py").write_bytes(b"")
    (folder / "blank.txt").write_text(" \n", encoding="utf-8")
    (folder / ".hidden").write_bytes(b"\0")
    bundle = load_text(folder, tokenizer, 20, eval_ratio=0)
    assert bundle.counts["documents_empty"] == 2 and bundle.counts["documents"] == 6


def test_text_mistakes(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    def assert_refused(match: str, source: Any, seq_len: int = 8, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            load_text(source, tokenizer, seq_len, **options)

    good = write_texts(tmp_path / "good", 3)
    assert_refused(r"nothere.*does not exist. Found in .*good", tmp_path / "nothere" / "a.txt")
    assert_refused(r"does not exist", [good / "00.txt", "missing.txt"])
    assert_refused(r"list of sources is empty", [])
    (tmp_path / "empty").mkdir()
    assert_refused(r"folder .*empty holds no files", tmp_path / "empty")
    assert_refused(r"No file matches .*\*\.rst", str(good / "*.rst"))
    (tmp_path / "zero.txt").write_bytes(b"")
    assert_refused(r"zero.txt is empty", tmp_path / "zero.txt")
    (good / "b.bin").write_bytes(b"ab\0cd")
    assert_refused(r"b\.bin is binary: byte 2 is NUL", good, eval_ratio=0)
    (good / "b.bin").write_bytes(b"abc\xffdef")
    assert_refused(r"b\.bin is not UTF-8 text: byte 3 \(0xff\)", good, eval_ratio=0)
    (good / "b.bin").unlink()
    assert_refused(r"seq_len=1000 tokens are asked, \d+ were found", good, 1000)
    assert_refused(r"too little for one train row", good / "00.txt", 30, eval_ratio=0.1)
    assert_refused(r"too little for one eval row", good, 60, eval_ratio=0.1, eval_source=good / "00.txt")
    assert_refused(
        r"seq_len=64 is longer than the model's context: max_position_embeddings=32",
        good,
        64,
        max_position_embeddings=32,
    )
    assert_refused(r"seq_len=1: a row needs", good, 1)
    assert_refused(r"eval_ratio=1", good, eval_ratio=1.0)
    assert_refused(r"max_tokens=5 is less than one row", good, max_tokens=5)
    assert_refused(r"pack='x' is unknown", good, pack="x")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"\n', encoding="utf-8")
    assert_refused(r"rows\.jsonl:3 is not JSON", path)
    path.write_text('{"text": "a"}\n["b"]\n', encoding="utf-8")
    assert_refused(r"rows\.jsonl:2 is a JSON list", path)
    path.write_text('{"text": "a"}\n{"txt": "b", "n": 1}\n', encoding="utf-8")
    assert_refused(r"rows\.jsonl:2 has no 'text'. Found: txt, n", path)
    path.write_text('{"text": 5}\n', encoding="utf-8")
    assert_refused(r"rows\.jsonl:1: 'text' is int \(5\)", path)
    path.write_text("\n", encoding="utf-8")
    assert_refused(r"rows\.jsonl has no rows", path)
    table = tmp_path / "rows.csv"
    table.write_text("text,n\na,1\nb,c,2\n", encoding="utf-8")
    assert_refused(r"rows\.csv:3 has 3 fields; the header names 2: text, n", table)
    table.write_text('text,n\n"a"b,1\n', encoding="utf-8")
    assert_refused(r"rows\.csv:2 is not CSV", table)
    table.write_text("text,text\na,b\n", encoding="utf-8")
    assert_refused(r"names a column twice", table)
    assert_refused(r"embedded model 'minilm' has no rows of text", "minilm")
    endless = byte_tokenizer(eos_token=None)
    with pytest.raises(ValueError, match="no end-of-text token"):
        load_text(good, endless, 8)


def test_text_from_the_standard_library(tokenizer: PreTrainedTokenizerFast):
    bundle = load_text("python-stdlib", tokenizer, 256, max_tokens=10_000)
    assert len(bundle.train) == 39 and bundle.counts["documents"] > 300
    assert "files_not_utf8" in bundle.counts and "python-stdlib" in bundle.description
    resolved = load_text(assets.resolve_data("python-stdlib"), tokenizer, 256, max_tokens=10_000)
    assert resolved.train["input_ids"] == bundle.train["input_ids"] and resolved.description == bundle.description
