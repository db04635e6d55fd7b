"""Conversations as tokens, each with its label: the token where the assistant speaks, else -100."""

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from sparsetrain.core.quote import quoted
from sparsetrain.data.collate import IGNORED_LABEL
from sparsetrain.data.conversations import Conversation, conversation_of, row_key
from sparsetrain.data.remarks import Remarks
from sparsetrain.data.rows import Row
from sparsetrain.data.special_tokens import beginning_ids, end_id
from sparsetrain.data.template import RowTemplate


def encode_row(
    row: Row, tokenizer: Any, max_length: int, remarks: Remarks | None = None
) -> tuple[list[int], list[int]]:
    """All token ids of one row and their labels: the ids inside what the assistant says, -100 elsewhere.

    Labels are only looked for in the first `max_length` tokens.

    Raises:
        ValueError: see `hf.data.load_sft`.
    """
    talk, remarks = conversation_of(row), remarks or Remarks()
    if tokenizer.chat_template is None:
        return _encode_plain(talk, tokenizer, remarks)
    template = RowTemplate(tokenizer, talk, remarks)
    if template.marks_spans:
        ids, mask = template.marked()
        return ids, [token if inside else IGNORED_LABEL for token, inside in zip(ids, mask)]
    text = template.text
    ids, starts = _tokenise(tokenizer, text)
    cut = starts[max_length] if max_length < len(ids) else len(text)
    inside = bytearray(len(text) + 1)
    for begin, end in template.spans(cut):
        inside[begin:end] = b"\1" * (end - begin)
    return ids, [token if inside[start] else IGNORED_LABEL for token, start in zip(ids, starts)]


def _tokenise(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Ids and the character each begins at."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets, so assistant tokens cannot be found. "
            "Use the fast version of this tokenizer."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), [start for start, _ in encoded["offset_mapping"]]


def _encode_plain(talk: Conversation, tokenizer: Any, remarks: Remarks) -> tuple[list[int], list[int]]:
    """Prompt and completion joined as they are, between the tokenizer's begin and end tokens."""
    if talk.plain is None:
        raise ValueError(
            f"{talk.origin} is a conversation and this {type(tokenizer).__name__} has no chat template. Set "
            "tokenizer.chat_template, use an instruction model's tokenizer, or rows with textual prompt and completion."
        )
    for key in talk.context:
        remarks.add(f"rows with '{quoted(key, 40)}', for which there is no chat template", talk.origin)
    prompt, completion = talk.plain
    ids, starts = _tokenise(tokenizer, prompt + completion)
    labels = [token if start >= len(prompt) else IGNORED_LABEL for token, start in zip(ids, starts)]
    begin_ids = beginning_ids(tokenizer)
    end_ids = [end for end in (end_id(tokenizer),) if end is not None]
    return begin_ids + ids + end_ids, [IGNORED_LABEL] * len(begin_ids) + labels + end_ids


def encoded_rows(
    rows: Iterable[Row], tokenizer: Any, max_length: int, known: Collection[str]
) -> Iterator[dict[str, list[int]]]:
    """Rows with a target, as a trainer takes them, one after the other; without those whose `row_key` is known."""
    for row in rows:
        if row_key(row) in known:
            continue
        ids, labels = encode_row(row, tokenizer, max_length)
        labels = [IGNORED_LABEL, *labels[1:max_length]]
        if any(label != IGNORED_LABEL for label in labels):
            yield {"input_ids": ids[:max_length], "labels": labels}
