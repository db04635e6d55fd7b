"""A tiny model with a tokenizer and a little text on disk, and recipes over them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sparsetrain.hf.study import compare as comparing
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.runs.extra_turns import Extra
from tests.families import llama_config

WORDS = ["red", "green", "blue", "sun", "moon", "star", "runs", "sits", "over", "under", "the", "a", "and", "not", "."]
LAYERS, HIDDEN, FFN, CONTEXT = 2, 32, 64, 128

ROUTED = {"method": "routed_ffn", "num_blocks": 4, "num_active": 2}
CLUSTERED = ROUTED | {"shared_ratio": 0.25, "partition": "clustered", "compensation": "mean"}
PQ = {"method": "pq_attention", "num_keys": 32, "block_q": 16, "block_k": 16, "local_tokens": 8}


def tokenizer() -> Any:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def llama(folder: Path, **changes: Any) -> Path:
    """A random Llama of two layers with its tokenizer, saved in `folder`."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": len(WORDS) + 4, "hidden_size": HIDDEN, "intermediate_size": FFN}
    sizes |= {"num_hidden_layers": LAYERS, "max_position_embeddings": CONTEXT}
    model = LlamaForCausalLM(llama_config(**(sizes | changes)))
    for parameter in model.parameters():  # the default 0.02 leaves attention uniform and FFNs silent
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def bert(folder: Path) -> Path:
    """A random BERT of two layers with its tokenizer, without a classification head."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def text(folder: Path, files: int = 12, words: int = 600, seed: int = 0) -> Path:
    """Text files of random sentences."""
    folder.mkdir(exist_ok=True)
    draw = random.Random(seed)
    for i in range(files):
        (folder / f"{i}.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(words)), encoding="utf-8")
    return folder


def recipe(folder: Path, **changes: Any) -> Recipe:
    """A run of six short steps over a tiny Llama and text in `folder`, both made when missing."""
    if not (folder / "model").exists():
        llama(folder / "model")
    if not (folder / "text").exists():
        text(folder / "text")
    values = {
        "model": str(folder / "model"),
        "data": str(folder / "text"),
        "output": str(folder / "out"),
        "seq_len": 64,
        "batch_size": 2,
        "steps": 6,
        "lr": 1e-2,
        "lora_r": 4,
        "methods": [],
        "calibration_tokens": 512,
        "eval_tokens": 512,
        "save_every": 2,
        "device": "cpu",
        "deploy": "sparse",
    }
    if "epochs" in changes:
        del values["steps"]
    return Recipe.from_values(values | changes)


def time_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison ends with its two sides: what is timed after them, in up to three more processes, is
    `test_both_sides_train_as_they_would_alone_in_turns`' and `tests.runs.test_extra_turns`'."""
    monkeypatch.setattr(comparing, "extra_turns", lambda *_: Extra())
