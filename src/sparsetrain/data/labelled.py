"""Texts with labels, from rows: checked, without repeats, divided so that every label is on both sides."""

from collections import Counter
from collections.abc import Iterable, Mapping

from sparsetrain.core.quote import quoted
from sparsetrain.data.rows import Row, field_of, text_of
from sparsetrain.data.split import divide


def read_examples(rows: list[Row], columns: tuple[str, str], where: Mapping[str, str]) -> tuple[list[Row], int]:
    """Rows as {"text", "label"}, filtered by `where`, without repeats; the number of repeats."""
    for key, wanted in where.items():
        chosen = [row for row in rows if str(field_of(row, key, "where")) == wanted]
        if not chosen:
            found = Counter(str(row[0][key]) for row in rows).most_common(6)
            shown = ", ".join(f"'{quoted(value, 30)}' ({n})" for value, n in found)
            raise ValueError(f"No row has {key}={wanted!r}. Found: {shown}. Pick one.")
        rows = chosen
    examples: dict[tuple[str, str], Row] = {}
    for row in rows:
        text = text_of(row, columns[0], "text_column").strip()
        label = field_of(row, columns[1], "label_column")
        if not text:
            raise ValueError(f"{row[1]}: {columns[0]!r} is blank. Fill it or remove the row.")
        if not isinstance(label, str | int) or label == "":
            raise ValueError(
                f"{row[1]}: {columns[1]!r} is {quoted(label, 60)} ({type(label).__name__}); a label is text or a whole "
                "number. Correct the row or name another label_column."
            )
        examples.setdefault((text, str(label)), ({"text": text, "label": str(label)}, row[1]))
    return list(examples.values()), len(rows) - len(examples)


def divide_examples(
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


def label_names_of(examples: list[Row], name: str) -> tuple[str, ...]:
    """The labels in the order of their numbers, whole numbers by value.

    Raises:
        ValueError: fewer than two.
    """
    found = {row["label"] for row, _ in examples}
    if len(found) < 2:
        raise ValueError(
            f"{name} has only the label {quoted(found)}; to classify takes two. Check label_column and where."
        )
    return in_order(found)


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Labels, each once, in the order of their numbers: by value where all are whole numbers."""
    found = set(labels)
    numbers = all(label.removeprefix("-").isdecimal() and len(label) < 20 for label in found)
    return tuple(sorted(found, key=(lambda label: (int(label), label)) if numbers else (lambda label: (0, label))))


def check_trained(train: list[Row], held_out: list[Row]) -> None:
    """Raise ValueError if a held-out row has a label that no training row has."""
    trained = {row["label"] for row, _ in train}
    for row, origin in held_out:
        if row["label"] not in trained:
            raise ValueError(
                f"{origin} has the label '{quoted(row['label'], 60)}', which no training row has. Found: "
                f"{quoted(', '.join(sorted(trained)))}. Correct the label or add training rows (max_rows may cut them "
                "off)."
            )


def describe(name: str, label_names: tuple[str, ...], counts: dict[str, int]) -> str:
    """One line for a report, from what was counted."""
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
