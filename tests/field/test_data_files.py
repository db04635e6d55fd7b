"""Files as people have them: read as they are meant, remarked on, or refused with what to do."""

from __future__ import annotations

import gzip
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from sparsetrain.data import files, reading
from sparsetrain.hf.data import load_classify, load_images, load_sft, load_text
from tests.hf.data.files import CHAT, byte_tokenizer, write_jsonl, write_texts

TEXTS = [{"text": f"text {i} " + "abc " * 10} for i in range(20)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(chat_template=CHAT)


@pytest.fixture
def read(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Any]:
    """Write a file's content and read it as text for a language model."""

    def run(name: str, content: Any, load: Any = load_text, **options: Any) -> Any:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else str(content).encode())
        return load(path, tokenizer, 16, **{"eval_ratio": 0, **options})

    return run


def raises_with(*words: str) -> Any:
    return pytest.raises(ValueError, match="(?s)" + ".*".join(words))


def all_text(bundle: Any) -> str:
    return str(byte_tokenizer().decode([token for row in bundle.train["input_ids"] for token in row]))


# JSON


@pytest.mark.parametrize(
    "content",
    [
        TEXTS,
        {"data": TEXTS},
        {"version": "1", "data": TEXTS},
        {"text": [row["text"] for row in TEXTS]},
        {"text": {str(i): row["text"] for i, row in enumerate(TEXTS)}},
    ],
    ids=["array", "data", "data beside a version", "columns", "columns of pandas"],
)
def test_a_json_file_of_rows_is_read_as_rows(content: Any, read: Callable[..., Any], tmp_path: Path):
    bundle = read("a.json", json.dumps(content, indent=1))
    assert bundle.counts["documents"] == 20 and "{" not in all_text(bundle)
    lines = read("b.json", "".join(json.dumps(row) + "\n" for row in TEXTS))
    assert lines.train["input_ids"] == bundle.train["input_ids"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"name": "x", "scripts": {}}, ["holds a JSON dict with the keys name, scripts", "Give an array"]),
        ([1, 2], ["holds a JSON list, and no rows"]),
        ([{"text": "a"}, 3], [r"a\.json\[1\] is a JSON int"]),
        ([], ["has no rows"]),
        ([{"instruction": "a", "input": "", "output": "b"}], [r"a\.json\[0\] has no 'text'", "task=sft"]),
        ({"messages": [{"role": "user", "content": "a"}]}, ["holds a JSON dict with the keys messages"]),
        ([{"text": None}], [r"a\.json\[0\]: 'text' is null. Fill it"]),
    ],
)
def test_a_json_file_of_something_else_is_refused(content: Any, words: list[str], read: Callable[..., Any]):
    with raises_with(*words):
        read("a.json", json.dumps(content))


def test_a_broken_json_file_is_named_with_its_place(read: Callable[..., Any]):
    with raises_with(r"a\.json is not JSON: .* at line 2, column 1"):
        read("a.json", '[{"text": "a"},\n')


def test_json_among_texts_is_a_text_and_said(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    folder = write_texts(tmp_path / "code", 3)
    (folder / "package.json").write_text('{"name": "a name of some length"}')
    bundle = load_text(folder, tokenizer, 16, eval_ratio=0)
    assert bundle.counts["documents"] == 4 and "1 JSON files without rows read as texts" in bundle.description
    (folder / "rows.json").write_text(json.dumps([{"instruction": "a", "output": "b"}]))
    with raises_with(r"rows\.json\[0\]", "task=sft"):
        load_text(folder, tokenizer, 16, eval_ratio=0)


DEEP = '{"text": ' + "[" * 200 + "]" * 200 + "}"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (DEEP, ["a.jsonl:2 is nested more than 100 levels"]),
        ("[" * 100_000, ["a.jsonl:2 is (nested too deep|not JSON)"]),
        ('{"text": ' + "7" * 5000 + "}", ["a.jsonl:2 holds a whole number of thousands of digits"]),
        ('{"text": "a", "text": "b"}', ["a.jsonl:2 names the key 'text' twice"]),
        ('{"text": NaN}', ["a.jsonl:2: 'text' is float .nan., not text"]),
        ('{"text": "a\x1b[31m"}', ["a.jsonl:2 is not JSON", r"\\x1b\[31m"]),
        ('{"text": ["' + "x" * 10_000 + '"]}', ["a.jsonl:2: 'text' is list"]),
        ("x" * 10_000, ["a.jsonl:2 is not JSON"]),
    ],
)
def test_a_broken_row_is_named_in_a_short_message(line: str, words: list[str], read: Callable[..., Any]):
    with raises_with(*words) as error:
        read("a.jsonl", f'{{"text": "a"}}\n{line}\n')
    message = str(error.value)
    assert len(message) < 500 and message.isprintable()


def test_lone_surrogates_are_replaced_and_said(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    half, whole = " \ud83d!", " \U0001f44d"
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(6)] + [{"text": half, "label": 0}]
    rows += [{"text": whole, "label": 1}]
    bundle = load_classify(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer, 16, eval_ratio=0)
    texts = [tokenizer.decode(ids) for ids in bundle.train["input_ids"]]
    assert "\ufffd!" in texts and whole.strip() in texts
    assert "1 rows with lone surrogates, replaced by U+FFFD (first: " in bundle.description
    assert "a.jsonl:7)" in bundle.description
    messages = [{"role": "user", "content": "q", half: half}, {"role": "assistant", "content": half}]
    path = tmp_path / "b.json"
    path.write_text(json.dumps([{"messages": messages}]))
    assert "surrogates" in load_sft(path, tokenizer, 50, eval_ratio=0).description


# encodings


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_files_with_a_mark_are_decoded(encoding: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    plain, marked = tmp_path / "plain", tmp_path / "marked"
    contents = {
        "a.txt": "äöü line\r\n" * 20,
        "b.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in TEXTS),
        "c.csv": 'text,n\r\n"ä\r\nb",1\r\n',
        "d.json": json.dumps(TEXTS[:3]),
    }
    for folder, name in ((plain, "utf-8"), (marked, encoding)):
        folder.mkdir()
        for file, content in contents.items():
            (folder / file).write_bytes(content.encode(name))
    found = [load_text(folder, tokenizer, 16, eval_ratio=0).train["input_ids"] for folder in (plain, marked)]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("café".encode("latin-1"), ["is not UTF-8 text: byte 3", "Convert it"]),
        ("a line".encode("utf-16-le"), ["is binary: byte 1 is NUL", "UTF-16 needs its mark"]),
        (b"\xff\xfea", ["is not UTF-16 text"]),
        (gzip.compress(b"text", mtime=0), ["compressed by gzip. Unpack it"]),
        (b"PK\x03\x04rest", ["zip archive"]),
        (b"PAR1rest", ["Parquet table. Save it as JSONL"]),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.json", "a.jsonl"])
def test_what_is_no_text_is_refused_with_advice(
    name: str, content: bytes, words: list[str], read: Callable[..., Any], tmp_path: Path
):
    with (
        raises_with(*words) if name == "a.txt" else pytest.raises(ValueError, match=r"a\.\w+(:1)? is (not|bin|comp|a )")
    ):
        read(name, content)


def test_latin_1_deep_in_a_table_is_named_with_its_line(read: Callable[..., Any]):
    with raises_with(r"a\.csv:3 is not UTF-8 text: byte 3 of the line"):
        read("a.csv", b"text,n\nab,1\ncaf\xe9,2\n")


def test_a_csv_with_other_separators_is_refused_with_advice(read: Callable[..., Any]):
    for mark in (";", "\t", "|"):
        with raises_with("a.csv:1 has the one column", "seem to be separated by", "commas in a .csv"):
            read("a.csv", f"text{mark}label\na{mark}1\n")
    assert read("a.csv", "\ntext\n" + "a line of one column\n" * 3).counts["documents"] == 3


# which files


@pytest.mark.parametrize("source", ["", "  ", "a" * 5000, "\0", "~nobody-of-that-name/x", "https://a.org/b.txt"])
def test_a_name_that_is_none_is_refused(source: str, tokenizer: PreTrainedTokenizerFast):
    with pytest.raises(ValueError) as error:
        load_text(source, tokenizer, 16)
    assert len(str(error.value)) < 600 and str(error.value).isprintable()


def test_what_never_ends_is_refused_by_name(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    folder = write_texts(tmp_path / "data", 2)
    os.mkfifo(folder / "pipe.jsonl")
    for source in (folder, folder / "pipe.jsonl", str(folder / "*"), [folder / "00.txt", folder / "pipe.jsonl"]):
        with raises_with(r"pipe\.jsonl is a named pipe, not a regular file"):
            load_text(source, tokenizer, 16)
    (folder / "pipe.jsonl").unlink()
    (folder / "link.txt").symlink_to("/dev/zero")
    with raises_with(r"link\.txt is a device"):
        load_text(folder, tokenizer, 16)
    with raises_with("is a device"):
        load_sft("/dev/zero", tokenizer, 16)
    (folder / "link.txt").unlink()
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(folder)  # the names of sockets are short
        listening.bind("socket.csv")
        os.chdir(here)
        with raises_with(r"socket\.csv is a socket"):
            load_classify(folder, tokenizer, 16)


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="no /proc here")
def test_files_of_the_kernel_are_refused(tokenizer: PreTrainedTokenizerFast):
    for source in ("/proc/self/status", "/proc/self", "/proc/self/*s"):
        with raises_with("kernel"):
            load_text(source, tokenizer, 16)


def test_pipes_among_images_and_saved_tables_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    os.mkfifo(tmp_path / "train-images-idx3-ubyte.gz")
    with raises_with("named pipe"):
        load_images(str(tmp_path))
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["a text of some length"] * 3}).save_to_disk(str(saved))
    arrow = next(saved.glob("*.arrow"))
    arrow.unlink()
    os.mkfifo(arrow)
    with raises_with(r"\.arrow is a named pipe"):
        load_text(str(saved), tokenizer, 8)
    state = json.loads((saved / "state.json").read_text())
    arrow.unlink()
    (saved / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": "/dev/zero"}]}))
    with raises_with("does not list the files of its folder"):
        load_text(str(saved), tokenizer, 8)
    for content in ("{", "[]", json.dumps(state), json.dumps(state | {"_data_files": []})):
        (saved / "state.json").write_text(content)
        with raises_with("saved"):
            load_text(str(saved), tokenizer, 8)


def test_links_in_circles_end(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    folder = write_texts(tmp_path / "data", 3)
    write_texts(tmp_path / "elsewhere", 5, size=60)
    for name in ("one", "two"):
        (folder / name).symlink_to(folder)
    (folder / "up").symlink_to(tmp_path)
    (folder / "other").symlink_to(tmp_path / "elsewhere")
    for source in (folder, str(folder / "**" / "*.txt")):
        bundle = load_text(source, tokenizer, 16, eval_ratio=0)
        assert bundle.counts["documents"] == 8
        assert "3 links to a folder above not followed" in bundle.description
    (folder / "self.txt").symlink_to("self.txt")
    with raises_with(r"self\.txt"):
        load_text(folder / "self.txt", tokenizer, 16)
    (folder / "self.txt").unlink()
    (folder / "gone.txt").symlink_to("nowhere.txt")
    with raises_with(r"gone\.txt is a link to nowhere\.txt, which does not exist"):
        load_text(folder, tokenizer, 16)


def test_a_file_under_two_names_is_read_once(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    folder = write_texts(tmp_path / "data", 3)
    once = load_text(folder, tokenizer, 16, eval_ratio=0)
    (folder / "hard.txt").hardlink_to(folder / "00.txt")
    (folder / "soft.txt").symlink_to("01.txt")
    for source in (folder, [folder, folder / "02.txt", folder / "soft.txt"]):
        twice = load_text(source, tokenizer, 16, eval_ratio=0)
        assert twice.train["input_ids"] == once.train["input_ids"]
        assert "files under a second name read once (first: " in twice.description
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    assert load_sft([rows, rows], tokenizer, 30, eval_ratio=0).counts["rows"] == 1


def test_patterns_say_what_they_leave_out(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    folder = write_texts(tmp_path / "data", 3)
    write_texts(folder / "below", 2, size=60)
    (folder / ".hidden.txt").write_text("\0")
    bundle = load_text(str(folder / "*"), tokenizer, 16, eval_ratio=0)
    assert bundle.counts["documents"] == 3 and "1 sub-folders not read" in bundle.description
    for pattern in ("**", "**/*.txt", "**/[0-9]*"):
        bundle = load_text(str(folder / pattern), tokenizer, 16, eval_ratio=0)
        assert bundle.counts["documents"] == 5 and "not read" not in bundle.description
    with raises_with("No file matches", "found nothing but folders"):
        load_text(str(folder / "bel*"), tokenizer, 16)


@pytest.mark.parametrize("pattern", ["", "*", "**/*.txt", "locked/*.txt"])
def test_a_folder_that_cannot_be_read_is_an_error(
    pattern: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    folder = write_texts(tmp_path / "data", 3)
    write_texts(folder / "locked", 2)
    real = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == ("data" if pattern == "*" else "locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(files.os, "scandir", scandir)
    with raises_with("cannot be read: Permission denied"):
        load_text(str(folder / pattern), tokenizer, 16)


def test_a_file_that_cannot_be_read_or_vanishes_is_an_error(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    folder = write_texts(tmp_path / "data", 3)
    real = files.find_files

    def found(*asked: Any) -> Any:
        listed = real(*asked)
        (folder / "01.txt").unlink(missing_ok=True)
        return listed

    monkeypatch.setattr("sparsetrain.hf.data.sources.find_files", found)
    with raises_with(r"01\.txt is gone"):
        load_text(folder, tokenizer, 16)
    monkeypatch.undo()

    def denied(path: Path, *_: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)
    with raises_with(r"00\.txt cannot be read: Permission denied"):
        load_text(folder / "00.txt", tokenizer, 16)


def test_what_is_too_large_is_refused_before_it_is_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.write(b"text")
        file.truncate(reading.MOST_BYTES + 1)  # sparse: it takes no space
    with raises_with(r"a\.txt has 4\.3 GB; .* at most 4\.3 GB", "Divide it"):
        load_text(path, tokenizer, 16)
    os.truncate(path, 1 << 30)
    with raises_with(r"a\.txt is binary: byte 4 is NUL"):
        load_text(path, tokenizer, 16)
    monkeypatch.setattr("sparsetrain.data.rows.MOST_JSON_BYTES", 100)
    monkeypatch.setattr(reading, "MOST_LINE_BYTES", 100)
    (tmp_path / "a.json").write_text(json.dumps(TEXTS))
    with raises_with(r"a\.json has .* a row a line, as \.jsonl"):
        load_text(tmp_path / "a.json", tokenizer, 16)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + json.dumps({"text": "a" * 200}))
    with raises_with(r"a\.jsonl:2 is a line of more than"):
        load_text(tmp_path / "a.jsonl", tokenizer, 16)


def test_labels_of_thousands_of_digits_are_texts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    rows = [{"text": f"t{i}", "label": ("9" * 5000, "1")[i % 2]} for i in range(4)]
    bundle = load_classify(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer, 16, eval_ratio=0)
    assert bundle.num_labels == 2


def test_names_with_control_characters_are_shown_escaped(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    folder = tmp_path / "new\nline\x1b[31m"
    folder.mkdir()
    for name, content in (("a.jsonl", "{"), ("a.csv", "a;b\n"), ("a.txt", "\0"), ("a.json", "{}"), ("b.txt", "")):
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match=r"new\\nline") as error:
            load_text(folder / name, tokenizer, 16)
        assert str(error.value).isprintable()
    deep = tmp_path.joinpath(*["long name of a folder"] * 20)
    deep.mkdir(parents=True)
    (deep / "b.txt").write_text("")
    with raises_with("…", r"b\.txt is empty"):
        load_text(deep / "b.txt", tokenizer, 16)
