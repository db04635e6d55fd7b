"""Conversations for supervised fine-tuning: rendered with the chat template, only assistant tokens are targets.

A row has `messages` (a list of {"role", "content"}), `prompt` and `completion`, each a text or a list of messages,
or another form of `conversation_of`. With a chat template in the tokenizer a textual prompt becomes a user message
and the completion the assistant's; without one they are joined as they are and ended with the end-of-text token.
A row's `tools`, `documents` and `chat_template_kwargs` reach the template; messages of a `prompt`, and those with
the weight 0, are no targets.

Assistant spans come from the template's {% generation %} marks if it has them, else from rendering the
conversation up to each assistant message.
"""

from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sparsetrain.data.collate import IGNORED_LABEL, Collator, check_length
from sparsetrain.data.conversations import describe, row_key
from sparsetrain.data.encoding import encode_row, encoded_rows
from sparsetrain.data.remarks import Remarks
from sparsetrain.data.rows import Row
from sparsetrain.data.special_tokens import padding_id
from sparsetrain.data.split import divide
from sparsetrain.hf.data.bundle import DataBundle, Progress
from sparsetrain.hf.data.sources import EvalChoice, HubChoice, Source, load_sides, source_name
from sparsetrain.hf.data.streams import Ahead


def load_sft(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    eval_source: Source | None = None,
    eval_ratio: float = 0.05,
    max_rows: int | None = None,
    max_eval_rows: int | None = None,
    seed: int = 0,
    dataset_config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    eval_split: str | None = None,
    max_position_embeddings: int | None = None,
    progress: Progress | None = None,
    stream_ahead: int | None = None,
) -> DataBundle:
    """Rows of one conversation each, with labels on what the assistant says (its end-of-turn token included).

    Rows longer than `max_length` are cut on the right and counted (`train_truncated`, `eval_truncated`); rows with
    no target left are dropped and counted (`..._dropped_no_target`). Equal conversations never lie on both sides.

    Args:
        source: JSONL, JSON (or CSV with prompt and completion), "chitchat", "gsm8k", a saved folder or a hub name.
        max_length, max_position_embeddings: most tokens a row, and the model's context to check that against.
        eval_source, eval_split: held-out rows of their own, instead of the share `eval_ratio` (0 for none).
        max_rows, max_eval_rows: stop at this many rows with targets, in the seeded order; None for all.
        dataset_config, split, revision: of hub data sets and saved folders.
        progress: called with one line every 1,000 rows.
        stream_ahead: read this many rows, and all others when training comes to them (`data.streams`).

    Raises:
        ValueError: `max_length` does not fit the model; missing or malformed source or row; no chat template where one
            is needed, or one that cannot render a row or rewrites earlier turns unmarked; a side without targets.
    """
    check_length(max_length, "max_length", max_position_embeddings)
    name = source_name(source)
    choice = EvalChoice(source=eval_source, split=eval_split, ratio=eval_ratio)
    hub, ahead = HubChoice(config=dataset_config, split=split, revision=revision), Ahead(stream_ahead)
    rows, eval_rows, remarks = load_sides(source, hub, choice, ahead.rows)
    train_rows, eval_rows, num_dropped = divide(rows, eval_rows, eval_ratio, seed, key=row_key)
    counts = {"rows": len(rows), "duplicates_of_eval": num_dropped}
    train = _encode(train_rows, tokenizer, max_length, max_rows, "train", counts, remarks, progress)
    held_out = None
    if eval_rows is not None:
        held_out = _encode(eval_rows, tokenizer, max_length, max_eval_rows, "eval", counts, remarks, progress)
    known = {row_key(row) for row in eval_rows or ()}

    def rest() -> Iterator[Any]:
        return encoded_rows(ahead.later_rows(source, hub), tokenizer, max_length, known)

    return DataBundle(
        train=train,
        eval=held_out,
        collate_fn=Collator(padding_id(tokenizer)),
        description=describe(name, counts) + remarks.text() + ahead.says(len(rows)),
        counts=counts,
        stream=ahead.stream(train, rest, seed, progress),
    )


def _encode(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_rows: int | None,
    side: str,
    counts: dict[str, int],
    remarks: Remarks,
    progress: Progress | None,
) -> Dataset:
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    truncated = dropped = targets = 0
    for row in rows:
        kept = len(columns["input_ids"])
        if kept == max_rows:
            break
        ids, labels = encode_row(row, tokenizer, max_length, remarks)
        truncated += len(ids) > max_length
        # The first token is never predicted: without its label, labels and predictions are equal in number.
        labels = [IGNORED_LABEL, *labels[1:max_length]]
        num_targets = sum(label != IGNORED_LABEL for label in labels)
        if not num_targets:
            dropped += 1
            continue
        columns["input_ids"].append(ids[:max_length])
        columns["labels"].append(labels)
        targets += num_targets
        if progress is not None and (kept + 1) % 1000 == 0:
            progress(f"tokenised {kept + 1:,} conversations ({side})")
    if not columns["input_ids"]:
        raise ValueError(
            f"None of the {len(rows)} {side} rows has an assistant token within max_length={max_length} "
            f"({truncated} were longer). Raise max_length, or check that the rows have assistant messages."
        )
    counts |= {
        f"{side}_rows": len(columns["input_ids"]),
        f"{side}_tokens": sum(map(len, columns["input_ids"])),
        f"{side}_target_tokens": targets,
        f"{side}_truncated": truncated,
        f"{side}_dropped_no_target": dropped,
    }
    return Dataset.from_dict(columns)
