"""Conversations in the forms in which they are published: what reaches the template, and what is learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from sparsetrain.data.encoding import encode_row
from sparsetrain.data.remarks import Remarks
from sparsetrain.hf.data import load_sft
from tests.hf.data.files import CHAT, MARKED, byte_tokenizer, targets, write_jsonl

WITH_TOOLS = (
    "{% if tools %}<s>tools:{{ tools | tojson }}</s>\n{% endif %}{% for m in messages %}<s>{{ m['role'] }}:"
    "{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
    "</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}


def a_call(arguments: Any = '{"a": 1}', **keys: Any) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call], **keys}


def encoded(row: Any, template: str | None, remarks: Remarks | None = None) -> tuple[str, str]:
    """The whole text of a row and what of it is learnt."""
    tokenizer = byte_tokenizer(chat_template=template)
    ids, labels = encode_row((row, "a.jsonl:1"), tokenizer, 1000, remarks)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    return str(tokenizer.decode(ids)), targets(tokenizer, {"labels": labels})


def test_tools_reach_the_template_and_calls_are_learnt() -> None:
    talk = [USER, a_call(), {"role": "tool", "content": "3"}, ANSWER]
    text, learnt = encoded({"messages": talk, "tools": TOOLS}, WITH_TOOLS)
    assert text.startswith("<s>tools:" + json.dumps(TOOLS)) and "None" not in text
    assert learnt == '[add {"a": 1}]</s>yes</s>'
    for tools in (json.dumps(TOOLS), [*TOOLS]):  # as TRL has them in a table
        assert encoded({"messages": talk, "tools": tools}, WITH_TOOLS)[0] == text
    for content in ("", None):
        assert encoded({"messages": [USER, a_call(content=content)]}, WITH_TOOLS)[1] == '[add {"a": 1}]</s>'
    without = {key: value for key, value in a_call().items() if key != "content"}
    assert encoded({"messages": [USER, without]}, WITH_TOOLS)[1] == '[add {"a": 1}]</s>'
    assert encoded({"messages": [a_call(), USER]}, WITH_TOOLS)[1] == '[add {"a": 1}]</s>'


@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
@pytest.mark.parametrize(
    "written",
    ["c.function.arguments | tojson", "c.function.arguments if c.function.arguments is string else "
     "c.function.arguments | tojson", "'' + c.function.arguments"],
)  # fmt: skip
def test_arguments_are_written_once_whatever_the_template_takes(written: str, arguments: Any) -> None:
    template = WITH_TOOLS.replace("c.function.arguments | tojson", written)
    row = {"messages": [USER, a_call(arguments)]}
    if written.startswith("''") and isinstance(arguments, dict):
        with pytest.raises(ValueError, match=r"a\.jsonl:1: the chat template cannot render"):
            encoded(row, template)
    else:
        assert encoded(row, template)[1] == '[add {"a": 1}]</s>'


def test_templates_that_add_content_up_get_an_empty_one() -> None:
    template = WITH_TOOLS.replace("{% if m.content %}{{ m.content }}{% endif %}", "{{ '' + m.content }}")
    assert encoded({"messages": [USER, a_call()]}, template)[1] == '[add {"a": 1}]</s>'


def test_what_a_template_has_no_place_for_is_said_or_refused() -> None:
    remarks = Remarks()
    encoded({"messages": [USER, ANSWER], "tools": TOOLS, "chat_template_kwargs": {"mood": 1}}, CHAT, remarks)
    assert "rows with 'tools', which the chat template does not read (first: a.jsonl:1)" in remarks.text()
    assert "rows with 'mood'" in remarks.text()
    encoded({"prompt": "a", "completion": "b", "tools": TOOLS}, None, remarks)
    assert "there is no chat template" in remarks.text()
    with pytest.raises(ValueError, match=r"a\.jsonl:1 has 'tool_calls', and the chat template has no place"):
        encoded({"messages": [USER, a_call()]}, CHAT)


def test_documents_and_keys_of_the_template_reach_it() -> None:
    template = "{% for d in documents %}<{{ d.title }}>{% endfor %}{{ mood }}:" + CHAT
    row = {"messages": [USER, ANSWER], "documents": [{"title": "T", "text": ""}]}
    text, learnt = encoded({**row, "chat_template_kwargs": {"mood": "gay"}}, template)
    assert text.startswith("<T>gay:<s>user") and learnt == "yes</s>"
    for keys in ({"chat_template": "x"}, {"tokenize": True}, "mood"):
        with pytest.raises(ValueError, match="'chat_template_kwargs' is"):
            encoded({**row, "chat_template_kwargs": keys}, template)


@pytest.mark.parametrize("template", [CHAT, MARKED], ids=["prefixes", "generation marks"])
def test_weights_choose_what_is_learnt(template: str) -> None:
    talk = [USER, {**ANSWER, "content": "no", "weight": 0}, USER, {**ANSWER, "weight": 1}, {**USER, "weight": 0}]
    text, learnt = encoded({"messages": talk}, template)
    assert "no" in text and learnt == "yes</s>"
    talk[1]["weight"] = None
    assert encoded({"messages": talk}, template)[1] == "no</s>yes</s>"
    split = {"prompt": talk[:3], "completion": talk[3:4]}
    assert encoded(split, template)[1] == "yes</s>"
    with pytest.raises(ValueError, match=r"messages\[1\] has the weight 0\.5. Give 0"):
        encoded({"messages": [USER, {**ANSWER, "weight": 0.5}]}, template)


def test_weights_that_marks_cannot_tell_apart_are_refused() -> None:
    begins, ends = "{% generation %}", "{% endgeneration %}"
    twice = MARKED.replace(f"</s>{ends}", f"{ends}-{begins}</s>{ends}")
    with pytest.raises(ValueError, match="marks 4 spans for 2 answers"):
        encoded({"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER]}, twice)


def test_parts_of_text_are_joined_and_others_refused() -> None:
    parts = [{"type": "text", "text": "y", "image_url": None}, {"type": "text", "text": "es"}]
    assert encoded({"messages": [USER, {**ANSWER, "content": parts}]}, CHAT)[1] == "yes</s>"
    for part in ({"type": "image_url", "image_url": "x"}, 3, {"type": "text"}):
        with pytest.raises(ValueError, match=r"messages\[0\] has a part that is no text"):
            encoded({"messages": [{"role": "user", "content": [part]}, ANSWER]}, CHAT)


def test_nulls_of_unified_tables_count_as_absent(tmp_path: Path) -> None:
    rows = [
        {"messages": None, "conversations": None, "prompt": "q", "completion": "yes", "tools": None},
        {"messages": [{**USER, "tool_calls": None}, {**ANSWER, "tool_calls": None, "weight": None}], "prompt": None},
        {"messages": None, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "yes"}]},
    ]
    found = [encoded(row, CHAT) for row in rows]
    assert found[0] == found[1] == found[2] and found[0][1] == "yes</s>"
    # a table has the arguments of all calls in every call
    table = datasets.Dataset.from_list(
        [{"messages": [USER, a_call({"a": 1})], "tools": TOOLS}, {"messages": [USER, a_call({"b": 2})], "tools": None}]
    )
    table.save_to_disk(str(tmp_path / "saved"))
    tokenizer = byte_tokenizer(chat_template=WITH_TOOLS)
    bundle = load_sft(str(tmp_path / "saved"), tokenizer, 500, eval_ratio=0)
    learnt = {targets(tokenizer, row) for row in bundle.train}
    assert learnt == {'[add {"a": 1}]</s>', '[add {"b": 2}]</s>'}


def test_instructions_are_read_as_they_are_published() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert encoded(row, CHAT) == ("<s>user:Add.\n\n1 2</s>\n<s>assistant:3</s>\n", "3</s>")
    text, learnt = encoded(row, None)
    assert learnt == "3</s>" and "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3" in text
    assert "### Input" not in encoded({**row, "input": ""}, None)[0]
    with pytest.raises(ValueError, match="has 'history' beside 'instruction'"):
        encoded({**row, "history": [["a", "b"]]}, CHAT)


def test_the_assistants_first_words_are_found_behind_equal_ones() -> None:
    template = "{% if tools %}add yes add{% endif %}" + CHAT
    assert encoded({"messages": [ANSWER, USER], "tools": TOOLS}, template)[1] == "yes</s>"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
        ("{{ messages[9].content }}", "UndefinedError"),
        ("{% for m in messages %}{{ m.content + 3 }}{% endfor %}", "TypeError"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError"),
        ("{{ raise_exception('x' * 100000) }}", "TemplateError: x"),
    ],
)
def test_templates_that_raise_name_the_row(template: str, words: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [USER, ANSWER]}])
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: the chat template cannot render.*" + words) as error:
        load_sft(path, byte_tokenizer(chat_template=template), 50, eval_ratio=0)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "row",
    [
        {"messages": "x" * 10_000},
        {"messages": [3]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": None, "content": "a"}]},
        {"messages": [{"role": "tool", "content": {"a": 1}}]},
        {"messages": [USER, {"role": "assistant", "content": None}]},
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []}]},
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": "add"}]},
        {"messages": [USER, a_call("{not json")]},
        {"messages": [USER, ANSWER], "tools": "[1, 2"},
        {"messages": [USER, ANSWER], "tools": [1]},
        {"messages": [USER, ANSWER], "documents": {"a": 1}},
        {"prompt": "a", "completion": [ANSWER]},
        {"prompt": [USER], "completion": "a"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"text": "a"},
        {"instruction": "a", "output": 3},
        {"instruction": "a", "input": ["b"], "output": "c"},
        {},
    ],
)
def test_malformed_rows_are_named_in_a_short_message(row: Any) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl:1") as error:
        encoded(row, WITH_TOOLS)
    assert len(str(error.value)) < 400


def test_a_dictionary_of_templates_is_asked_for_the_one_with_tools(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": CHAT, "tool_use": WITH_TOOLS}  # type: ignore[assignment]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [USER, a_call()], "tools": TOOLS}])
    assert targets(tokenizer, load_sft(path, tokenizer, 500, eval_ratio=0).train[0]) == '[add {"a": 1}]</s>'


def test_templates_without_a_default_name_the_row(tmp_path: Path) -> None:
    tokenizer: PreTrainedTokenizerFast = byte_tokenizer()
    tokenizer.chat_template = {"other": CHAT}  # type: ignore[assignment]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [USER, ANSWER]}])
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the chat template cannot render.*no default"):
        load_sft(path, tokenizer, 500, eval_ratio=0)


def test_equal_conversations_with_other_numbers_stay_on_one_side(tmp_path: Path) -> None:
    rows = [{"id": i, "messages": [{**USER, "content": f"q{i % 10}"}, ANSWER], "prompt": None} for i in range(40)]
    bundle = load_sft(write_jsonl(tmp_path / "a.jsonl", rows), byte_tokenizer(chat_template=CHAT), 50, eval_ratio=0.3)
    assert bundle.eval is not None and len(bundle.eval) == 12
    assert not set(map(tuple, bundle.eval["input_ids"])) & set(map(tuple, bundle.train["input_ids"]))
