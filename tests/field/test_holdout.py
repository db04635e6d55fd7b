"""What is held out of text: its share, whatever the length of the documents, and nothing of it is trained on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sparsetrain.data.packing import cut_at_line
from sparsetrain.data.split import share_of_text
from sparsetrain.hf.data import load_text
from tests.hf.data.files import byte_tokenizer, write_jsonl, write_texts

PIECE = 16


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def a_text(name: str, lines: int) -> str:
    """Lines of which no two are equal, each as long as a row."""
    return "".join(f"{name}{i:07}".ljust(PIECE - 1, ".") + "\n" for i in range(lines))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A book of 1,000 lines and notes of 10 and 11."""
    for name, lines in (("book", 1000), ("note1", 10), ("note2", 11)):
        (tmp_path / f"{name}.txt").write_text(a_text(name, lines))
    return tmp_path


def sides(source: Any, tokenizer: PreTrainedTokenizerFast, seq_len: int = PIECE, **keys: Any) -> tuple[str, str, Any]:
    """The text of both sides, and the bundle; rows of training are in another order, those held out are not."""
    bundle = load_text(source, tokenizer, seq_len, **keys)
    assert bundle.eval is not None
    train, held_out = (
        str(tokenizer.decode([token for row in side["input_ids"] for token in row]))
        for side in (bundle.train, bundle.eval)
    )
    return train, held_out, bundle


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("limits", [{}, {"max_tokens": 4096, "max_eval_tokens": 4096}])
@pytest.mark.parametrize("rows", [False, True], ids=["files", "rows"])
def test_a_book_and_two_notes(
    seed: int, limits: dict[str, Any], rows: bool, folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = [path.read_text() for path in sorted(folder.glob("*.txt"))]
    source = write_jsonl(folder / "a.jsonl", [{"text": text} for text in texts]) if rows else str(folder / "*.txt")
    train, held_out, bundle = sides(source, tokenizer, seed=seed, **limits)
    total = sum(map(len, texts))
    assert 0.04 * total < bundle.counts["eval_tokens"] < 0.06 * total
    assert bundle.counts["train_tokens"] >= min(0.9 * total, limits.get("max_tokens", total))
    lines = {line for text in texts for line in text.splitlines()}
    assert not [line for line in lines if line in train and line in held_out]
    assert "the end of one that is trained on up to there" in bundle.description
    again = load_text(source, tokenizer, PIECE, seed=seed, **limits)
    assert again.train["input_ids"] == bundle.train["input_ids"]


def test_the_held_out_part_does_not_depend_on_how_much_is_trained_on(
    folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    _, whole, _ = sides(folder, tokenizer, seed=1)
    for tokens in (1024, 4096):
        train, part, _ = sides(folder, tokenizer, seed=1, max_tokens=tokens, max_eval_tokens=512)
        assert part[:400] in whole and not any(line in train for line in whole.splitlines() if len(line) == PIECE - 1)


@pytest.mark.parametrize("seed", range(4))
def test_two_texts_of_unequal_length_are_trained_on(
    seed: int, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "a.txt").write_text(a_text("long", 500))
    (tmp_path / "b.txt").write_text("a note\n")
    _, _, bundle = sides(tmp_path, tokenizer, 64, seed=seed)
    assert bundle.counts["train_tokens"] > 7000 and 300 < bundle.counts["eval_tokens"] < 500


def test_a_copy_of_the_book_does_not_bring_its_end_back(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (folder / "copy.txt").write_text((folder / "book.txt").read_text() + "\n")
    for seed in range(4):
        train, held_out, bundle = sides(folder, tokenizer, seed=seed)
        assert bundle.counts["duplicates_of_eval"] == 1
        assert not [line for line in held_out.split("\n") if len(line) == PIECE - 1 and line in train]


def test_documents_stay_whole_where_asked(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for seed in range(4):
        _, _, bundle = sides(folder, tokenizer, seed=seed, holdout="documents")
        assert bundle.counts["train_documents"] + bundle.counts["eval_documents"] == 3
        assert "documents_cut" not in bundle.counts
    with pytest.raises(ValueError, match=r"holdout='lines' is unknown. Use 'tokens' or 'documents'"):
        load_text(folder, tokenizer, PIECE, holdout="lines")  # type: ignore[arg-type]


def test_many_texts_of_about_equal_length_stay_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = write_texts(tmp_path / "texts", 60, size=100)
    for seed in range(4):
        both = [load_text(folder, tokenizer, PIECE, seed=seed, holdout=how) for how in ("tokens", "documents")]
        assert both[0].train["input_ids"] == both[1].train["input_ids"]
        assert both[0].counts == both[1].counts


def test_a_row_is_filled_from_more_of_the_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = write_texts(tmp_path / "texts", 10)
    _, _, bundle = sides(folder, tokenizer, 200)
    assert bundle.counts["eval_tokens"] == 200 and bundle.counts["train_tokens"] == 200
    (tmp_path / "short.txt").write_text(a_text("x", 10))
    _, _, bundle = sides(tmp_path / "short.txt", tokenizer, 64)
    assert bundle.counts["eval_tokens"] == 64 and bundle.counts["train_tokens"] == 64


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([100] * 40, (2, 0.0)),
        ([100] * 3, (0, 0.15)),
        ([1000], (0, 0.05)),
        ([10_000, 10, 10], (0, 0.0501)),
        ([10, 10_000, 10], (1, 0.0491)),
        ([10, 10, 10_000], (2, 0.0481)),
        ([0, 0], (1, 0.0)),
        ([300, 10_000], (1, 0.0)),  # more than half of the share
        ([1] * 95 + [1000] * 5, (95, 0.1598)),
    ],
)
def test_shares(sizes: list[int], expected: tuple[int, float]) -> None:
    count, end = share_of_text(sizes, 0.05)
    assert (count, round(end, 4)) == expected


def test_shares_of_any_sizes_are_shares() -> None:
    draw = random.Random(0)
    for _ in range(500):
        sizes = [int(draw.lognormvariate(6, draw.choice([0.1, 1, 3]))) + 1 for _ in range(draw.randint(1, 60))]
        ratio = draw.choice([0.01, 0.05, 0.3])
        count, end = share_of_text(sizes, ratio)
        held_out = sum(sizes[:count]) + (end * sizes[count] if end else 0)
        assert 0.49 * ratio * sum(sizes) <= held_out <= 2.01 * ratio * sum(sizes)


def test_a_cut_is_near_where_it_was_asked() -> None:
    text = "title\n" + "x" * 10_000
    head, tail = cut_at_line(text, 0.95)
    assert head + tail == text and len(tail) == pytest.approx(500, abs=1)
    head, tail = cut_at_line("ab\n" * 1000, 0.95)
    assert head.endswith("\n") and len(tail) == 150
