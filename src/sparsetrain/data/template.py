"""A tokenizer's chat template, filled with one row: its text, and where in it the assistant speaks."""

import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from sparsetrain.core.quote import quoted
from sparsetrain.data.conversations import Conversation, Message, with_arguments_read
from sparsetrain.data.remarks import Remarks

_MARKS = re.compile(r"{%-?\s*generation\b")
_WRITES_JSON = re.compile(r"(arguments|args|calls?|tc|function)['\"\])]*\s*(\|\s*(tojson|items)|\.items)")
"""A template that writes the arguments of calls, or whole calls, as JSON: it takes them as objects."""
_TAKES_TEXT = re.compile(r"(arguments|args)['\"\])]*\s+is\s+(not\s+)?string")
_ANSWER = "here-begins-the-answer"


class RowTemplate:
    """The chat template of a tokenizer and the conversation that it renders.

    text: the whole conversation. messages: as the template was given them. marks_spans: whether it marks what the
    assistant says ({% generation %}).

    Raises:
        ValueError: the template cannot render the row, or has no place for its calls.
    """

    def __init__(self, tokenizer: Any, talk: Conversation, remarks: Remarks) -> None:
        self.tokenizer, self.talk = tokenizer, talk
        self.source = self._asked(tokenizer.get_chat_template, tools=talk.context.get("tools"))
        self.marks_spans = _MARKS.search(self.source) is not None
        self._check_read(remarks)
        self.messages, self.text = self._whole()

    def render(self, messages: list[Message], **options: Any) -> Any:
        """The text of some messages; with `tokenize`, what the tokenizer makes of it."""
        options = {"tokenize": False} | options
        copies = [dict(message) for message in messages]
        return self._asked(self.tokenizer.apply_chat_template, copies, **self.talk.context, **options)

    def spans(self, cut: int) -> Iterator[tuple[int, int]]:
        """The character span of each message to be learnt that begins before `cut`.

        A span is what an assistant message adds to the rendering of the messages before it (with the prompt for an
        answer), without the white space a template puts after the end of a turn. Each takes two renderings of a part
        of the conversation, so a row is not gone through past the cut: 2.6 times faster on chitchat at 512 tokens.
        """
        for i, message in enumerate(self.messages):
            if not self.talk.trained[i]:
                continue
            whole = self.render(self.messages[: i + 1])
            if i:
                before = self.render(self.messages[:i], add_generation_prompt=True)
            else:  # many templates cannot render an empty conversation
                before, found, _ = self.render([{**message, "content": _ANSWER}]).partition(_ANSWER)
                before = before if found else whole + _ANSWER
            if not (self.text.startswith(whole) and whole.startswith(before)):
                raise ValueError(
                    f"{self.talk.origin}: what the chat template makes of the conversation up to message {i} is not "
                    "how the whole begins, so the assistant's words cannot be found. Use a template with "
                    "{% generation %} marks, or one answer a row."
                )
            if len(before) >= cut:
                return
            yield len(before), len(whole.rstrip())

    def marked(self) -> tuple[list[int], list[bool]]:
        """Token ids, and which lie in the spans that the template marks and that are to be learnt."""
        encoded = self.render(self.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        mask = list(map(bool, encoded["assistant_masks"]))
        answers = [t for message, t in zip(self.messages, self.talk.trained) if message["role"] == "assistant"]
        if not all(answers):
            runs = [(inside, len(list(run))) for inside, run in groupby(mask)]
            if sum(inside for inside, _ in runs) != len(answers):
                raise ValueError(
                    f"{self.talk.origin}: the chat template marks {sum(inside for inside, _ in runs)} spans for "
                    f"{len(answers)} answers, so those that are not to be learnt cannot be told from the others. Use "
                    "rows in which every answer is learnt."
                )
            trained = iter(answers)
            mask = [inside for marked, length in runs for inside in [marked and next(trained)] * length]
        return list(encoded["input_ids"]), mask

    def _whole(self) -> tuple[list[Message], str]:
        first: ValueError | None = None
        for messages in self._forms():
            try:
                return messages, self.render(messages)
            except ValueError as error:
                first = first or error
        assert first is not None
        raise first

    def _forms(self) -> Iterator[list[Message]]:
        """The messages as templates take them, the likeliest first: a call's arguments as object or as text, and
        messages without content, or with an empty one."""
        given = self.talk.messages
        calls = any("tool_calls" in message for message in given)
        objects_first = calls and bool(_WRITES_JSON.search(self.source)) and not _TAKES_TEXT.search(self.source)
        for as_objects in [objects_first, not objects_first] if calls else [False]:
            form = with_arguments_read(given, self.talk.origin) if as_objects else given
            yield form
            if any("content" not in message for message in form):
                yield [{"content": "", **message} for message in form]

    def _check_read(self, remarks: Remarks) -> None:
        """Whether the template names what the row brings; what is said there and not shown would be learnt from
        nothing."""
        for key in ("tool_calls", "function_call"):
            if key not in self.source and any(message.get(key) for message in self.talk.messages):
                raise ValueError(
                    f"{self.talk.origin} has {key!r}, and the chat template has no place for them. Use a tokenizer "
                    "whose template reads them, or write the calls into the content."
                )
        for key in self.talk.context:
            if not re.search(rf"\b{re.escape(key)}\b", self.source):
                remarks.add(f"rows with '{quoted(key, 40)}', which the chat template does not read", self.talk.origin)

    def _asked(self, ask: Any, *given: Any, **options: Any) -> Any:
        """What the tokenizer answers; its errors are jinja's, Python's, or those of the template itself."""
        try:
            return ask(*given, **options)
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(
                f"{self.talk.origin}: the chat template cannot render the conversation ({type(error).__name__}: "
                f"{quoted(str(error))}). Correct the row, or use a tokenizer whose template takes it."
            ) from error
