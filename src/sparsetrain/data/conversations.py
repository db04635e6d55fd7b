"""Conversations, from rows."""

import json
from typing import Any

from sparsetrain.data.files import Row, text_of

Message = dict[str, str]
"""`role` and `content`."""


def row_key(row: Row) -> str:
    """What equal conversations have in common."""
    return json.dumps(row[0], sort_keys=True, default=str)


def messages_of(row: Row) -> list[Message]:
    """A row's messages; a textual prompt and completion become one of the user's and one of the assistant's.

    Raises:
        ValueError: the row is no conversation.
    """
    values, origin = row
    if "messages" in values:
        return _check_messages(values["messages"], "messages", origin)
    if "prompt" not in values or "completion" not in values:
        raise ValueError(
            f"{origin} is no conversation. Found: {', '.join(map(str, values))}. "
            "A row needs 'messages', or 'prompt' and 'completion'."
        )
    if isinstance(values["prompt"], list):
        return [
            *_check_messages(values["prompt"], "prompt", origin),
            *_check_messages(values["completion"], "completion", origin),
        ]
    return [
        {"role": "user", "content": text_of(row, "prompt", "prompt")},
        {"role": "assistant", "content": text_of(row, "completion", "completion")},
    ]


def _check_messages(messages: Any, key: str, origin: str) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{origin}: {key!r} is {str(messages)[:40]!r}, not a list of messages. Correct the row.")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(
                f"{origin}: {key}[{i}] is {str(message)[:60]!r}. A message needs 'role' and 'content', both text."
            )
    return messages


def describe(name: str, counts: dict[str, int]) -> str:
    """One line for a report, from what was counted."""
    line = (
        f"{name}: {counts['train_rows']:,} conversations, {counts['train_tokens']:,} tokens, "
        f"{counts['train_target_tokens']:,} of them targets"
    )
    if "eval_rows" in counts:
        line += f"; held out: {counts['eval_rows']:,} conversations"
    for what in ("truncated", "dropped_no_target"):
        total = sum(count for key, count in counts.items() if key.endswith(what))
        if total:
            line += f"; {total:,} {what.replace('_', ' ')}"
    return line
