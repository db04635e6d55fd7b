"""Conversations for supervised fine-tuning: rendered with the chat template, only assistant tokens are targets."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sparsetrain.core.quote import quoted
from sparsetrain.data.collate import IGNORED_LABEL, Collator, check_length
from sparsetrain.data.conversations import Conversation, conversation_of, describe, row_key
from sparsetrain.data.remarks import Remarks
from sparsetrain.data.rows import Row
from sparsetrain.data.split import divide
from sparsetrain.hf.data.bundle import (
    DataBundle,
    Progress,
    beginning_ids,
    end_id,
    padding_id,
)
from sparsetrain.hf.data.sources import EvalChoice, HubChoice, Source, load_rows, load_sides, source_name
from sparsetrain.hf.data.streams import Stream, ahead, first_rows, stream_rows
from sparsetrain.hf.data.template import RowTemplate


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
    eval_split: str | None = None,
    max_position_embeddings: int | None = None,
    progress: Progress | None = None,
    stream_ahead: int | None = None,
) -> DataBundle:
    """Rows of one conversation each, with labels on what the assistant says (its end-of-turn token included).

    A row has `messages` (a list of {"role", "content"}), `prompt` and `completion`, each a text or a list of messages,
    or another form of `conversation_of`. With a chat template in the tokenizer a textual prompt becomes a user message
    and the completion the assistant's; without one they are joined as they are and ended with the end-of-text token.
    A row's `tools`, `documents` and `chat_template_kwargs` reach the template; messages of a `prompt`, and those with
    the weight 0, are no targets.

    Assistant spans come from the template's {% generation %} marks if it has them, else from rendering the
    conversation up to each assistant message.

    Rows longer than `max_length` are cut on the right and counted (`train_truncated`, `eval_truncated`); rows with
    no target left are dropped and counted (`..._dropped_no_target`). Equal conversations never lie on both sides.

    Args:
        source: JSONL, JSON (or CSV with prompt and completion), "chitchat", "gsm8k", a saved folder or a hub name.
        max_length: most tokens a row.
        eval_source, eval_split: held-out rows of their own, instead of the share `eval_ratio` (0 for none).
        max_rows, max_eval_rows: stop at this many rows with targets, in the seeded order; None for all.
        dataset_config, split: for hub data sets and saved folders.
        max_position_embeddings: the model's context, to check `max_length` against.
        progress: called with one line every 1,000 rows.
        stream_ahead: read this many rows, and all others when training comes to them (`hf.data.streams`).

    Raises:
        ValueError: `max_length` does not fit the model; missing or malformed source or row; no chat template where one
            is needed, or one that cannot render a row or rewrites earlier turns unmarked; a side without targets.
    """
    check_length(max_length, "max_length", max_position_embeddings)
    name = source_name(source)
    choice = EvalChoice(source=eval_source, split=eval_split, ratio=eval_ratio)
    hub = HubChoice(config=dataset_config, split=split)
    read = load_rows if stream_ahead is None else partial(first_rows, count=stream_ahead)
    rows, eval_rows, remarks = load_sides(source, hub, choice, read)
    train_rows, eval_rows, num_dropped = divide(rows, eval_rows, eval_ratio, seed, key=row_key)
    counts = {"rows": len(rows), "duplicates_of_eval": num_dropped}
    train = _encode(train_rows, tokenizer, max_length, max_rows, "train", counts, remarks, progress)
    held_out = None
    if eval_rows is not None:
        held_out = _encode(eval_rows, tokenizer, max_length, max_eval_rows, "eval", counts, remarks, progress)
    stream = None
    if stream_ahead is not None:
        known = {row_key(row) for row in eval_rows or []}

        def rest() -> Iterator[dict[str, list[int]]]:
            later = islice(stream_rows(source, hub, Remarks()), stream_ahead, None)
            return _encoded((row for row in later if row_key(row) not in known), tokenizer, max_length)

        stream = Stream(train, rest, seed, progress)
    return DataBundle(
        train=train,
        eval=held_out,
        collate_fn=Collator(padding_id(tokenizer)),
        description=describe(name, counts) + remarks.text() + ahead(stream_ahead, len(rows)),
        counts=counts,
        stream=stream,
    )


def _encoded(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[dict[str, list[int]]]:
    """Rows with a target, as `_encode` makes them, one after the other."""
    for row in rows:
        ids, labels = encode_row(row, tokenizer, max_length)
        labels = [IGNORED_LABEL, *labels[1:max_length]]
        if any(label != IGNORED_LABEL for label in labels):
            yield {"input_ids": ids[:max_length], "labels": labels}


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


def encode_row(
    row: Row, tokenizer: PreTrainedTokenizerBase, max_length: int, remarks: Remarks | None = None
) -> tuple[list[int], list[int]]:
    """All token ids of one row and their labels: the ids inside what the assistant says, -100 elsewhere.

    Labels are only looked for in the first `max_length` tokens.

    Raises:
        ValueError: see `load_sft`.
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


def _tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Ids and the character each begins at."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets, so assistant tokens cannot be found. "
            "Use the fast version of this tokenizer."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["input_ids"]), [start for start, _ in encoded["offset_mapping"]]


def _encode_plain(
    talk: Conversation, tokenizer: PreTrainedTokenizerBase, remarks: Remarks
) -> tuple[list[int], list[int]]:
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
