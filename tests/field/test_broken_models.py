"""A model that is damaged, of another family, or impossible is refused in one line, before memory is asked for."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsetrain.hf.model.io import load
from tests.field.strangers import adapter, arguments, assert_refused, changed, told
from tests.field.strangers import place as place
from tests.hf import runs

Capsys = pytest.CaptureFixture[str]
LOADING = ("eval", "export", "finetune", "sensitivity")


def rewritten(source: Path, folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """A copy of a model's folder with other tensors."""
    shutil.copytree(source, folder)
    save_file(edit(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


TENSORS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "one missing": (lambda w: {k: v for k, v in w.items() if "1.mlp.up" not in k}, "no weights for model.layers.1.mlp"),
    "head missing": (lambda w: {k: v for k, v in w.items() if "lm_head" not in k}, "no weights for lm_head"),
    "renamed": (lambda w: {k.replace("layers", "blocks"): v for k, v in w.items()}, "no weights for"),
    "prefixed": (lambda w: {f"module.{k}": v for k, v in w.items()}, "no weights for"),
    "another shape": (lambda w: w | {"lm_head.weight": torch.zeros(18, 32)}, "lm_head.weight in another size"),
    "transposed": (lambda w: {k: v.T.contiguous() if v.ndim == 2 else v for k, v in w.items()}, "in another size"),
    "not a number": (lambda w: {k: v * float("nan") for k, v in w.items()}, "holds NaN or infinity"),
    "one infinity": (lambda w: w | {"model.norm.weight": torch.full((32,), float("inf"))}, "model.norm.weight"),
    "integers": (lambda w: {k: v.to(torch.int8) for k, v in w.items()}, ""),
    "none": (lambda w: {}, "no tensor"),
    "a layer more": (
        lambda w: w | {k.replace("s.1.", "s.2."): v.clone() for k, v in w.items() if "layers.1." in k},
        "further layers",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_weights_of_another_model_are_refused_by_every_verb(
    place: Path, tmp_path: Path, capsys: Capsys, name: str
) -> None:
    edit, said = TENSORS[name]
    folder = rewritten(place / "model", tmp_path / "model", edit)
    if name == "integers":  # cast to the dtype of the run, as transformers does: values are whatever they are
        assert told(capsys, arguments("eval", folder, place / "text", tmp_path / "out"))[0] in (0, 2)
        return
    for verb in LOADING:
        assert_refused(capsys, arguments(verb, folder, place / "text", tmp_path / verb), said)
        assert not (tmp_path / verb).exists()
    with pytest.raises(ValueError, match=said):
        load(folder)


def test_profile_refuses_them_too(place: Path, tmp_path: Path, capsys: Capsys) -> None:
    folder = rewritten(place / "model", tmp_path / "model", TENSORS["renamed"][0])
    assert_refused(capsys, arguments("profile", folder, place / "text", tmp_path / "out"), "no weights for")


def test_an_encoder_is_no_language_model(place: Path, tmp_path: Path, capsys: Capsys) -> None:
    for verb in LOADING:
        assert_refused(capsys, arguments(verb, place / "bert", place / "text", tmp_path / verb))
    from transformers import BertConfig, BertModel

    config = BertConfig.from_pretrained(place / "bert")
    BertModel(config).save_pretrained(tmp_path / "trunk")  # as minilm: no head at all
    runs.tokenizer().save_pretrained(tmp_path / "trunk")
    for verb in LOADING:
        words = arguments(verb, tmp_path / "trunk", place / "text", tmp_path / verb)
        assert_refused(capsys, words, "encoder", "no trained language model")
    with pytest.raises(ValueError, match="no trained language model"):
        load(tmp_path / "trunk")


def test_a_new_head_may_be_random_and_nothing_else(place: Path, tmp_path: Path, capsys: Capsys) -> None:
    rows = [
        {"text": f"red sun {i} {runs.WORDS[i % 15]} {runs.WORDS[i // 15]}", "label": "ab"[i % 2]} for i in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))

    def classify(model: Path, output: Path) -> list[str]:
        return [*arguments("finetune", model, tmp_path / "rows.jsonl", output), "--task", "classify"]

    code, said = told(capsys, classify(place / "bert", tmp_path / "new"))
    assert code == 0, said
    renamed = rewritten(
        place / "bert", tmp_path / "renamed", lambda w: {k.replace("layer.1", "l"): v for k, v in w.items()}
    )
    assert_refused(capsys, classify(renamed, tmp_path / "out"), "no weights for bert.encoder.layer.1")
    code, said = told(capsys, ["eval", str(tmp_path / "new")])
    assert code == 0, said


CONFIGS: dict[str, Any] = {
    "text": {"hidden_size": "abc"},
    "negative": {"hidden_size": -32},
    "zero": {"num_attention_heads": 0},
    "not a number": {"intermediate_size": float("nan")},
    "a fraction": {"num_hidden_layers": 1.5},
    "true": {"num_hidden_layers": True},
    "a list": {"hidden_size": [32, "x"]},
    "a million layers": {"num_hidden_layers": 10**6},
    "a thousand layers": {"num_hidden_layers": 1000},
    "a wide model": {"hidden_size": 2**16, "intermediate_size": 2**20},
    "a vast vocabulary": {"vocab_size": 10**7},
    "a billion labels": {"num_labels": 10**9},
    "few tokens": {"vocab_size": 10},
    "another family": {"model_type": "gpt2"},
    "no decoder": {"model_type": "t5"},
    "images": {"model_type": "vit"},
    "an activation": {"hidden_act": "nope"},
    "rotation": {"rope_parameters": {"rope_type": "nope"}},
    "rotation by text": {"rope_parameters": "nope"},
    "rotation by zero": {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
    "heads": {"num_attention_heads": 3},
    "an odd head": {"head_dim": 7},
    "below zero": {"rms_norm_eps": -1.0},
    "dropout": {"attention_dropout": 7.0},
    "padding": {"pad_token_id": 10**6},
    "labels": {"id2label": [1]},
    "layers' types": {"layer_types": ["nope"]},
    "inside": {"text_config": [1]},
    "classes": {"architectures": "LlamaForCausalLM"},
    "a class": {"architectures": [5]},
    "a dtype": {"dtype": "float99"},
    "quantised": {"quantization_config": {"quant_method": "fp8"}},
    "quantised by a number": {"quantization_config": 5},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_impossible_config_is_refused(place: Path, tmp_path: Path, capsys: Capsys, name: str) -> None:
    folder = changed(place / "model", tmp_path / "model", **CONFIGS[name])
    for verb in ("eval", "finetune"):
        assert_refused(capsys, arguments(verb, folder, place / "text", tmp_path / verb), str(folder))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "5", "[" * 100_000, '{"model_type": 5}', "{}", "\0", "\ud800"]
)
def test_a_config_that_is_none_is_refused(place: Path, tmp_path: Path, capsys: Capsys, content: str) -> None:
    folder = changed(place / "model", tmp_path / "model")
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    for verb in ("eval", "export", "finetune", "plan", "predict", "pretrain"):
        assert_refused(capsys, arguments(verb, folder, place / "text", tmp_path / verb), "config.json")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "empty", "link"])
def test_only_regular_files_are_read(place: Path, tmp_path: Path, capsys: Capsys, file: str, kind: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(place / "model", folder)
    (folder / file).unlink()
    {
        "pipe": lambda path: os.mkfifo(path),
        "device": lambda path: path.symlink_to("/dev/zero"),
        "folder": lambda path: path.mkdir(),
        "empty": lambda path: path.touch(),
        "link": lambda path: path.symlink_to(path),
    }[kind](folder / file)
    for verb in ("eval", "export", "finetune"):
        assert_refused(capsys, arguments(verb, folder, place / "text", tmp_path / verb), file)
    if file == "config.json":
        for verb in ("plan", "predict", "pretrain"):
            assert_refused(capsys, arguments(verb, folder, place / "text", tmp_path / verb), file)


@pytest.mark.parametrize(
    "content",
    [
        b"\0" * 7,
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}',
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
)
def test_a_header_that_claims_too_much(place: Path, tmp_path: Path, capsys: Capsys, content: bytes) -> None:
    folder = changed(place / "model", tmp_path / "model")
    (folder / "model.safetensors").write_bytes(content)
    for verb in ("eval", "finetune"):
        assert_refused(capsys, arguments(verb, folder, place / "text", tmp_path / verb), "model.safetensors")


@pytest.mark.parametrize(
    "index",
    [[], {}, {"weight_map": 5}, {"weight_map": {"a": 5}}, {"weight_map": {"a": "../model/model.safetensors"}},
     {"weight_map": {"a": "/etc/passwd"}}, {"weight_map": {"a": "gone.safetensors"}}, {"weight_map": {"a": "a.bin"}}],
)  # fmt: skip
def test_a_damaged_index(place: Path, tmp_path: Path, capsys: Capsys, index: object) -> None:
    folder = changed(place / "model", tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(capsys, arguments("eval", folder, place / "text", tmp_path / "out"), "safetensors")


def test_shards_load_as_one(place: Path, tmp_path: Path) -> None:
    whole = load(place / "model").model
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    ids = torch.tensor([[4, 5, 6]])
    assert torch.equal(load(tmp_path / "sharded").model(ids).logits, whole(ids).logits)


TOKENIZERS: dict[str, tuple[str, str]] = {
    "no tokenizer": ("tokenizer.json", "{}"),
    "a list": ("tokenizer.json", "[]"),
    "deep": ("tokenizer.json", "[" * 100_000),
    "half": ("tokenizer.json", '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a"'),
    "another model": ("tokenizer.json", '{"version": "1.0", "added_tokens": [], "model": {"type": "Nope"}}'),
    "config a list": ("tokenizer_config.json", "[]"),
    "config deep": ("tokenizer_config.json", "[" * 100_000),
    "a class": ("tokenizer_config.json", '{"tokenizer_class": 5}'),
    "no tokenizer class": ("tokenizer_config.json", '{"tokenizer_class": "PreTrainedModel"}'),
    "padding": ("tokenizer_config.json", '{"pad_token": 5}'),
    "template": ("tokenizer_config.json", '{"chat_template": 5}'),
    "added": ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
    "length": ("tokenizer_config.json", '{"model_max_length": "x"}'),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_damaged_tokenizer_is_named(place: Path, tmp_path: Path, capsys: Capsys, name: str) -> None:
    file, content = TOKENIZERS[name]
    folder = changed(place / "model", tmp_path / "model")
    (folder / file).write_text(content)
    for verb in ("eval", "export", "finetune"):
        assert_refused(capsys, arguments(verb, folder, place / "text", tmp_path / verb), str(folder))
    words = arguments("pretrain", place / "model", place / "text", tmp_path / "out")
    words[words.index("--tokenizer") + 1] = str(folder)
    assert_refused(capsys, words, str(folder))


def test_a_tokenizer_larger_than_the_embedding(place: Path, tmp_path: Path, capsys: Capsys) -> None:
    folder = runs.llama(tmp_path / "small", vocab_size=12)
    for verb in ("eval", "finetune"):
        words = arguments(verb, folder, place / "text", tmp_path / verb)
        assert_refused(capsys, words, "ids up to 18", "12 rows of embedding")


def test_an_added_token_beyond_the_embedding_is_refused_where_it_is_used(
    place: Path, tmp_path: Path, capsys: Capsys
) -> None:
    """Gemma 3's tokenizer has one token more than its model: it is for images, and no text has it."""
    folder = changed(place / "model", tmp_path / "model")
    tokenizer = runs.tokenizer()
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(folder)
    assert told(capsys, arguments("eval", folder, place / "text", tmp_path / "out"))[0] == 0
    (tmp_path / "text.txt").write_text("red sun <image> moon " * 200)
    for verb in ("eval", "finetune"):
        words = arguments(verb, folder, tmp_path / "text.txt", tmp_path / verb)
        assert_refused(capsys, words, "token id 19", "19 rows of embedding")


def test_positions_after_the_padding_token(tmp_path: Path, place: Path, capsys: Capsys) -> None:
    """RoBERTa's table of 34 rows holds 32 tokens: its positions begin at 2."""
    from transformers import AutoConfig, RobertaConfig, RobertaForCausalLM

    from sparsetrain.hf.model.model_config import context_length, read_config

    sizes = {"vocab_size": 19, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 1}
    config = RobertaConfig(**sizes, intermediate_size=32, max_position_embeddings=34, is_decoder=True)
    RobertaForCausalLM(config).save_pretrained(tmp_path / "model")
    runs.tokenizer().save_pretrained(tmp_path / "model")
    assert context_length(AutoConfig.from_pretrained(tmp_path / "model")) == 32
    assert read_config(str(tmp_path / "model")).context == 32
    words = arguments("eval", tmp_path / "model", place / "text", tmp_path / "out")
    assert told(capsys, words)[0] == 0
    words[words.index("32")] = "33"
    assert_refused(capsys, words, "33", "32")


def test_a_tokenizer_that_is_there_is_not_passed_over(place: Path, tmp_path: Path) -> None:
    """An adapter's own damaged tokenizer is an error: the base model's would give other ids in silence."""
    folder = adapter(place, tmp_path / "adapter")
    assert load(folder).tokenizer is not None
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer of .*adapter"):
        load(folder)
