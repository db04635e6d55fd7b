"""Small files, and a tokenizer whose lengths can be reckoned by hand."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sparsetrain.hf import assets

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
MARKED = (
    "{% for m in messages %}<s>{{ m['role'] }}:{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
PAD, BOS, EOS = 0, 1, 2


def byte_tokenizer(**kwargs: Any) -> PreTrainedTokenizerFast:
    """One token a byte: lossless, and every length can be reckoned by hand."""
    alphabet = sorted(bytes_to_unicode().items())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *(char for _, char in alphabet)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "<s>", "</s>"])
    options = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{**options, **kwargs})


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_texts(folder: Path, num: int, size: int = 50) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num):
        (folder / f"{i:02}.txt").write_text(f"<{i:02}>" + chr(97 + i % 26) * (size - 4), encoding="utf-8")
    return folder


def all_text(tokenizer: PreTrainedTokenizerFast, rows: datasets.Dataset) -> str:
    return "".join(tokenizer.decode(row["input_ids"]) for row in rows)


def targets(tokenizer: PreTrainedTokenizerFast, row: Any) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def need(*names: str) -> None:
    for name in names:
        status = assets.asset_status(name)
        if status.state != "ready":
            pytest.skip(
                f"asset {name!r} is {status.state}: {status.problem}; fetch it with sparsetrain.hf.assets.fetch"
            )
