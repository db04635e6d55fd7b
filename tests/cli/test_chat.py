"""`sparsetrain chat`: a model is spoken to with its template or without, line by line, and within its context."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from sparsetrain.hf.model.io import load
from sparsetrain.hf.model.talk import Talk
from tests.cli.conftest import Call, save_llama, write_text

CHAT = (
    "{% for m in messages %}<s>{{ m['role'][0] }}{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>a{% endif %}"
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("plain") / "llama")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_llama(tmp_path_factory.mktemp("chatty") / "llama")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    left = iter(lines)

    def read(_shown: str = "") -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", read)


def test_an_answer_is_the_models_own_and_streams_as_it_is_made(plain: Path):
    talk = Talk(load(plain), max_new_tokens=12, temperature=0)
    pieces: list[str] = []
    said = talk.answer("def return", pieces.append)
    ids = talk.tokenizer("def return", return_tensors="pt")
    made = talk.model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert said == talk.tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "".join(pieces) == said
    assert not talk.messages  # nothing is kept of texts that are gone on with


def test_words_are_told_one_by_one(plain: Path, monkeypatch: pytest.MonkeyPatch):
    talk = Talk(load(plain))
    pieces: list[str] = []

    def generate(input_ids: Any, streamer: Any, **_how: Any) -> Any:
        made = talk.tokenizer("one two three", return_tensors="pt")["input_ids"]
        for ids in (input_ids, *made[0].split(1)):
            streamer.put(ids)
        streamer.end()
        return torch.cat([input_ids, made], dim=1)

    monkeypatch.setattr(talk.model, "generate", generate)
    assert talk.answer("def", pieces.append) == "one two three"
    assert pieces == ["one ", "two ", "three"]


def test_draws_follow_the_seed(plain: Path):
    said = [Talk(load(plain), max_new_tokens=12, seed=seed).answer("def") for seed in (0, 0, 1)]
    assert said[0] == said[1] != said[2]


def test_a_chat_keeps_what_was_said_and_forgets_what_does_not_fit(chatty: Path):
    talk = Talk(load(chatty), system="be brief", max_new_tokens=8, temperature=0)
    read: list[str] = []
    real = talk._read
    talk._read = lambda text: (read.append(text), real(text))[1]
    talk.answer("one")
    talk.answer("two")
    assert read[-1].startswith("<s>sbe brief</s><s>uone</s><s>a") and read[-1].endswith("<s>utwo</s><s>a")
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    talk.answer("x" * 90)  # the context is of 128 tokens, one a byte
    assert "one" not in read[-1] and read[-1].startswith("<s>sbe brief</s><s>u")
    assert talk.messages[1]["content"] == "x" * 90
    with pytest.raises(ValueError, match="tokens do not fit into the context of 128"):
        talk.answer("x" * 200)
    talk.forget()
    assert talk.messages == [{"role": "system", "content": "be brief"}]


def test_lines_are_answered_until_exit(chatty: Path, call: Call, monkeypatch: pytest.MonkeyPatch):
    typed(monkeypatch, "hello", "", "/history", "/new", "/history", "/what", "y" * 300, "/exit", "never read")
    result = call("chat", chatty, "--max-new-tokens", 4, "--temperature", 0)
    assert result.code == 0, result.err
    assert result.out.count("user: hello\n") == 1 and "Begun anew." in result.out
    assert "/what is no command" in result.out and "do not fit into the context" in result.out
    assert "never read" not in result.out
    typed(monkeypatch, "hello")  # and then the end of the input
    assert call("chat", chatty, "--max-new-tokens", 4).code == 0


def test_a_run_answers_from_wherever_it_was_trained(
    plain: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_text(tmp_path / "text.txt", 2000)
    monkeypatch.chdir(plain.parent)
    flags = ("--seq-len", 64, "--steps", 1, "--eval-tokens", 64, "--dtype", "fp32")
    trained = call("finetune", "--model", "llama", "--data", tmp_path / "text.txt", "--preset", "dense",
                   "--output", tmp_path / "run", *flags)  # fmt: skip
    assert trained.code == 0, trained.err
    assert f"sparsetrain chat {tmp_path / 'run'}" in trained.out
    answer = call("chat", tmp_path / "run", "--prompt", "def", "--max-new-tokens", 4, "--json").json
    assert answer["ok"] and answer["prompt"] == "def" and not answer["chat"]
    shown = call("chat", tmp_path / "run", "--prompt", "def", "--max-new-tokens", 4)
    assert shown.code == 0 and shown.out.strip()


def test_what_cannot_be_spoken_to(plain: Path, call: Call, tmp_path: Path):
    assert "Give --prompt too" in call("chat", plain, "--json").out
    assert "greater than or equal to 1" in call("chat", plain, "--prompt", "a", "--max-new-tokens", 0).err
    (plain / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (plain / "tokenizer_config.json").rename(tmp_path / "tokenizer_config.json")
    try:
        assert "has no tokenizer beside its weights" in call("chat", plain, "--prompt", "a").err
    finally:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).rename(plain / name)


def test_a_path_that_is_not_there_is_not_asked_of_the_hub(tmp_path: Path, call: Call) -> None:
    (tmp_path / "runs" / "first").mkdir(parents=True)
    result = call("chat", tmp_path / "runs" / "frist", "--prompt", "a")
    assert (
        result.code == 2
        and "not asked of the hub" in result.err
        and "Did you mean 'first'? It holds first." in result.err
    ), result.err
