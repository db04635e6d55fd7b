"""Conversations, from rows in the forms in which they are published."""

import json
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any

from sparsetrain.core.quote import quoted
from sparsetrain.data.reading import BadJson, parse_json
from sparsetrain.data.rows import Row, text_of

Message = dict[str, Any]
"""`role`, `content` (absent beside calls that stand without words), and what else a chat template reads."""

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
"""ShareGPT's names."""
_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n{}### Response:\n"
)
_READ = frozenset(
    {"messages", "conversations", "prompt", "completion", "instruction", "input", "output"}
    | {"tools", "documents", "chat_template_kwargs"}
)
_PAIRS = tuple(
    (asked, answered)
    for asked in ("prompt", "question", "query", "instruction", "input", "source", "document", "article")
    for answered in ("answer", "response", "output", "target", "completion", "summary", "highlights")
)
_CALLS = ("tool_calls", "function_call")
_RESERVED = frozenset(
    {"conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize", "padding"}
    | {"continue_final_message", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"}
    | {"return_assistant_tokens_mask", "sanitize_control_tokens"}
)
"""Arguments of `apply_chat_template` that are no business of a row."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A row's messages, which of them may be learnt, and what else the chat template is given.

    trained: False for messages of weight 0, and for those of a prompt.
    context: `tools`, `documents` and the keys of `chat_template_kwargs`.
    plain: prompt and completion, where the row has them as texts.
    """

    messages: list[Message]
    trained: list[bool]
    context: dict[str, Any] = field(default_factory=dict)
    plain: tuple[str, str] | None = None
    origin: str


def row_key(row: Row) -> str:
    """What equal conversations have in common: all that is read of them, so no number that a row has for itself."""
    keys = _only_pair(row[0]) or _READ
    read = {key: value for key, value in row[0].items() if key in keys and value is not None}
    return json.dumps(read or row[0], sort_keys=True, default=str)


def conversation_of(row: Row) -> Conversation:
    """A row as a conversation: `messages`; `conversations` with from and value (ShareGPT); `prompt` and `completion`,
    texts or lists of messages; `instruction`, `input` and `output` (Alpaca); or nothing but something asked and
    answered, as `question` and `answer`. Keys that are null count as absent.

    Raises:
        ValueError: the row is none of that, or malformed.
    """
    values, origin = {key: value for key, value in row[0].items() if value is not None}, row[1]
    row = values, origin
    context = _context(values, origin)
    for key in ("messages", "conversations"):
        if key in values:
            messages, trained = _messages(values[key], key, origin)
            return Conversation(messages=messages, trained=trained, context=context, origin=origin)
    if "prompt" in values and "completion" in values:
        if isinstance(values["prompt"], list) or isinstance(values["completion"], list):
            prompt, _ = _messages(values["prompt"], "prompt", origin)
            answer, trained = _messages(values["completion"], "completion", origin)
            trained = [False] * len(prompt) + trained
            return Conversation(messages=prompt + answer, trained=trained, context=context, origin=origin)
        pair = plain = text_of(row, "prompt", "prompt"), text_of(row, "completion", "completion")
    elif "instruction" in values and "output" in values:
        pair, plain = _instruction(row)
    elif (names := _only_pair(row[0])) is not None:
        pair = plain = text_of(row, names[0], "prompt"), text_of(row, names[1], "completion")
    else:
        raise ValueError(
            f"{origin} is no conversation. Found: {quoted(', '.join(map(str, values)))}. A row needs 'messages', "
            "'prompt' and 'completion', or 'instruction' and 'output'; rows of 'text' are for task=lm."
            + _renamed(values)
        )
    messages = [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return Conversation(messages=messages, trained=[False, True], context=context, plain=plain, origin=origin)


def is_conversation(columns: Set[str]) -> bool:
    """Do rows of these columns hold conversations, or something asked and answered, if under other names?"""
    return bool({"messages", "conversations"} & columns) or any(set(pair) <= columns for pair in _PAIRS)


def _only_pair(values: dict[str, Any]) -> tuple[str, str] | None:
    """The names of what is asked and answered, of a row that holds nothing else, numbers aside."""
    keys = {key for key, value in values.items() if not isinstance(value, int | float)}
    return next((pair for pair in _PAIRS if set(pair) == keys), None)


def _renamed(values: dict[str, Any]) -> str:
    """What to do with columns that are asked and answered under other names."""
    found = next((pair for pair in _PAIRS if set(pair) <= values.keys()), None)
    return "" if found is None else f" Rename {found[0]!r} to 'prompt' and {found[1]!r} to 'completion'."


def _instruction(row: Row) -> tuple[tuple[str, str], tuple[str, str]]:
    """What is asked and answered: as the words of two speakers, and as Stanford Alpaca writes both into one text."""
    for key in ("history", "system"):
        if row[0].get(key):
            raise ValueError(f"{row[1]} has {key!r} beside 'instruction', which is not read. Write it as 'messages'.")
    asked, answer = text_of(row, "instruction", "instruction"), text_of(row, "output", "output")
    given = text_of(row, "input", "input") if "input" in row[0] else ""
    if not given.strip():
        return (asked, answer), (_ALPACA.format("", asked, ""), answer)
    more = (", paired with an input that provides further context", f"### Input:\n{given}\n\n")
    return (f"{asked}\n\n{given}", answer), (_ALPACA.format(more[0], asked, more[1]), answer)


def _context(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """What the template is given beside the messages; empty lists are nothing."""
    context = {}
    for key in ("tools", "documents"):
        found = values.get(key)
        if isinstance(found, str):  # a table has one type a column, and tools have many
            found = _parsed(found, f"{origin}: {key!r}") if found.strip() else None
        if found is not None and not (isinstance(found, list) and all(isinstance(entry, dict) for entry in found)):
            raise ValueError(f"{origin}: {key!r} is {quoted(found, 60)}, not a list of objects. Correct the row.")
        if found:
            context[key] = found
    keys = values.get("chat_template_kwargs", {})
    if not isinstance(keys, dict) or _RESERVED & keys.keys():
        raise ValueError(
            f"{origin}: 'chat_template_kwargs' is {quoted(keys, 60)}; it is an object with keys that the chat template "
            f"reads, none of {', '.join(sorted(_RESERVED))}. Correct the row."
        )
    return context | keys


def _parsed(text: str, place: str) -> Any:
    try:
        return parse_json(text)
    except BadJson as error:
        raise ValueError(f"{place} {error}: '{quoted(text, 60)}'. Correct the row.") from error


def _messages(found: Any, key: str, origin: str) -> tuple[list[Message], list[bool]]:
    if not isinstance(found, list) or not found:
        raise ValueError(f"{origin}: {key!r} is {quoted(repr(found), 40)}, not a list of messages. Correct the row.")
    messages, trained = [], []
    for i, entry in enumerate(found):
        message, weight = _message(entry, f"{origin}: {key}[{i}]")
        messages.append(message)
        trained.append(message["role"] == "assistant" and weight)
    return messages, trained


def _message(found: Any, place: str) -> tuple[Message, bool]:
    """A message without its nulls and with its text in one piece, and whether its weight lets it be learnt."""
    message = {key: value for key, value in found.items() if value is not None} if isinstance(found, dict) else {}
    if "from" in message and "role" not in message:
        message["role"], message["content"] = message.pop("from"), message.pop("value", None)
        if isinstance(message["role"], str):
            message["role"] = _ROLES.get(message["role"], message["role"])
    if isinstance(message.get("content"), list):
        message["content"] = "".join(_text_of_part(part, place) for part in message["content"])
    elif "content" not in message and any(message.get(key) for key in _CALLS):
        pass  # an assistant that calls without a word
    elif not isinstance(message.get("content"), str):
        message.pop("role", None)
    if not isinstance(message.get("role"), str):
        raise ValueError(f"{place} is {quoted(found, 60)}. A message needs 'role' and 'content', both text.")
    weight = message.pop("weight", 1)
    if weight not in (0, 1):
        raise ValueError(f"{place} has the weight {quoted(weight, 40)}. Give 0 (not learnt) or 1.")
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"{place}: 'tool_calls' is {quoted(calls, 60)}, not a list of objects. Correct the row.")
    return message, bool(weight)


def _text_of_part(part: Any, place: str) -> str:
    if isinstance(part, dict) and part.get("type", "text") in ("text", "input_text", "output_text"):
        part = part.get("text")
    if not isinstance(part, str):
        raise ValueError(f"{place} has a part that is no text: {quoted(part, 60)}. Only text can be learnt from here.")
    return part


def with_arguments_read(messages: list[Message], origin: str) -> list[Message]:
    """Messages whose calls have their arguments as objects, for templates that write them as JSON themselves; OpenAI's
    format has them as JSON texts, which would be quoted a second time.

    Raises:
        ValueError: such a text is no JSON.
    """

    def call_read(call: dict[str, Any], place: str) -> dict[str, Any]:
        if isinstance(call.get("function"), dict):
            return {**call, "function": call_read(call["function"], place)}
        given = call.get("arguments")
        return {**call, "arguments": _parsed(given.strip() or "{}", place)} if isinstance(given, str) else call

    return [
        {**message, "tool_calls": [call_read(c, f"{origin}: a call's 'arguments'") for c in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


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
