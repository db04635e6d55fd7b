"""Conversations: what is labelled, cut and dropped; every mistake names the place and the way out."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sparsetrain.hf import assets
from sparsetrain.hf.data import load_sft, load_text
from tests.hf.data.files import CHAT, MARKED, byte_tokenizer, need, targets, write_jsonl


@pytest.mark.parametrize("template", [CHAT, MARKED], ids=["prefixes", "generation marks"])
def test_sft_labels_only_what_the_assistant_says(template: str, tmp_path: Path):
    tokenizer = byte_tokenizer(chat_template=template)
    talk = [("system", "be kind"), ("user", "hi"), ("assistant", "yes é"), ("user", "and?"), ("assistant", " no ")]
    messages = [{"role": role, "content": content} for role, content in talk]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
    bundle = load_sft(path, tokenizer, 200, eval_ratio=0)
    row = bundle.train[0]
    assert row["input_ids"] == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert targets(tokenizer, row) == "yes é</s> no </s>"
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"]))
    assert bundle.counts["train_target_tokens"] == len("yes é".encode()) + len(" no ") + 2


def test_sft_prompt_and_completion(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, chat_tokenizer: PreTrainedTokenizerFast
):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    row = load_sft(path, tokenizer, 50, eval_ratio=0).train[0]
    assert tokenizer.decode(row["input_ids"]) == "1+1=2</s>" and targets(tokenizer, row) == "2</s>"
    row = load_sft(path, chat_tokenizer, 50, eval_ratio=0).train[0]
    assert tokenizer.decode(row["input_ids"]) == "<s>user:1+1=</s>\n<s>assistant:2</s>\n"
    assert targets(tokenizer, row) == "2</s>"
    lists = {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}
    row = load_sft(write_jsonl(tmp_path / "b.jsonl", [lists]), chat_tokenizer, 50, eval_ratio=0).train[0]
    assert targets(tokenizer, row) == "a</s>"
    table = tmp_path / "c.csv"
    table.write_text("prompt,completion\nq,a\n", encoding="utf-8")
    assert targets(tokenizer, load_sft(table, tokenizer, 50, eval_ratio=0).train[0]) == "a</s>"


def test_sft_conversation_begun_by_the_assistant(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast):
    messages = [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "hi"}]
    bundle = load_sft(write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}]), chat_tokenizer, 50, eval_ratio=0)
    assert targets(chat_tokenizer, bundle.train[0]) == "hello</s>"


def test_sft_truncates_and_drops_with_counts(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast):
    rows = [{"prompt": "q" * n, "completion": "a" * n} for n in (2, 20, 100)]
    rows.append({"messages": [{"role": "user", "content": "nobody answers"}]})
    bundle = load_sft(write_jsonl(tmp_path / "a.jsonl", rows), chat_tokenizer, 50, eval_ratio=0)
    # "<s>user:" and "</s>\n<s>assistant:" around the prompt: 6 and 13 tokens.
    assert bundle.counts["train_rows"] == 2 and bundle.counts["train_truncated"] == 2
    assert bundle.counts["train_dropped_no_target"] == 2
    assert sorted(len(row["input_ids"]) for row in bundle.train) == [25, 50]
    assert sorted(len(targets(chat_tokenizer, row)) for row in bundle.train) == [2 + len("</s>"), 50 - 39]
    assert "2 truncated; 2 dropped no target" in bundle.description


def test_sft_split_keeps_equal_conversations_together(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast):
    rows = [{"prompt": f"q{i % 10}", "completion": f"a{i % 10}"} for i in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    bundle = load_sft(path, chat_tokenizer, 50, eval_ratio=0.3)
    assert bundle.eval is not None and len(bundle.eval) == 12 and len(bundle.train) == 28
    assert not set(map(tuple, bundle.eval["input_ids"])) & set(map(tuple, bundle.train["input_ids"]))
    limited = load_sft(path, chat_tokenizer, 50, eval_ratio=0.3, max_rows=5, max_eval_rows=2)
    assert limited.train["input_ids"] == bundle.train["input_ids"][:5]
    assert limited.eval is not None and len(limited.eval) == 2
    other = write_jsonl(tmp_path / "eval.jsonl", rows[:1])
    assert load_sft(path, chat_tokenizer, 50, eval_source=other).counts["duplicates_of_eval"] == 4


def test_a_question_and_an_answer_are_a_prompt_and_a_completion(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast
):
    pairs = [(f"what is {i % 8}?", f"it is {i % 8}") for i in range(16)]
    as_trl = write_jsonl(tmp_path / "trl.jsonl", [{"prompt": a, "completion": b} for a, b in pairs])
    asked = [{"id": i, "question": a, "answer": b} for i, (a, b) in enumerate(pairs)]
    ours, theirs = (
        load_sft(path, chat_tokenizer, 50, eval_ratio=0.25)
        for path in (write_jsonl(tmp_path / "asked.jsonl", asked), as_trl)
    )
    assert ours.eval is not None and theirs.eval is not None
    for side, other in ((ours.train, ours.eval), (theirs.train, theirs.eval)):
        assert len(other) == 4 and not {*map(tuple, side["input_ids"])} & {*map(tuple, other["input_ids"])}
    seen = [
        sorted(row for side in sides for row in zip(side["input_ids"], side["labels"], strict=True))
        for sides in ((ours.train, ours.eval), (theirs.train, theirs.eval))
    ]
    assert seen[0] == seen[1]


def test_sft_mistakes(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, chat_tokenizer: PreTrainedTokenizerFast):
    def assert_refused(match: str, rows: list[Any], with_template: bool = True, **options: Any) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", rows)
        with pytest.raises(ValueError, match=match):
            load_sft(
                path, chat_tokenizer if with_template else tokenizer, **{"max_length": 50, "eval_ratio": 0, **options}
            )

    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    good = {"messages": [user, answer]}
    assert_refused(r"a\.jsonl:2 is no conversation. Found: text", [good, {"text": "x"}])
    told = r"Rename 'question' to 'prompt' and 'answer' to 'completion'\.$"
    assert_refused(told, [good, {"question": "x", "context": "c", "answer": "y"}])
    assert_refused(
        r"a\.jsonl:1: messages\[1\] is .*needs 'role' and 'content'", [{"messages": [user, {"role": "assistant"}]}]
    )
    assert_refused(r"'messages' is \[\], not a list", [{"messages": []}])
    assert_refused(r"'completion' is int", [{"prompt": "q", "completion": 3}])
    assert_refused(r"has no chat template", [good], with_template=False)
    assert_refused(r"None of the 1 train rows has an assistant token", [{"messages": [user]}])
    assert_refused(
        r"max_length=50 is longer than the model's context: max_position_embeddings=40",
        [good],
        max_position_embeddings=40,
    )
    assert_refused(r"No eval rows: found 1 rows", [good], eval_ratio=0.5)
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"messages": [user, answer, user, {"role": "assistant", "content": "b"}]}]
    )
    forgetful = byte_tokenizer(
        chat_template="{% for m in messages[-2:] %}{{ m['role'] + ':' + m['content'] }}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"up to message 1 is not how the whole begins"):
        load_sft(path, forgetful, 50, eval_ratio=0)


@pytest.mark.assets
def test_gsm8k_and_chitchat_conversations(chat_tokenizer: PreTrainedTokenizerFast):
    need("gsm8k", "chitchat")
    bundle = load_sft(assets.resolve_data("gsm8k"), chat_tokenizer, 4000)
    assert bundle.counts["rows"] == 1319 and bundle.counts["train_rows"] + bundle.counts["eval_rows"] == 1319
    assert "####" in targets(chat_tokenizer, bundle.train[0])
    bundle = load_sft("chitchat", chat_tokenizer, 400, max_rows=50, max_eval_rows=10)
    assert bundle.counts["rows"] == 7168 and len(bundle.train) == 50
    assert len(load_text("gsm8k", chat_tokenizer, 512, max_tokens=20_000).train) == 39
