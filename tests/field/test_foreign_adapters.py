"""Adapters and saved runs of strangers: of another model, damaged, or made to take minutes. Each is one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sparsetrain.core.patterns import check_pattern
from sparsetrain.hf.model.io import load, save
from sparsetrain.surgery.apply import sparsify
from tests.field.strangers import adapter, arguments, assert_refused, changed
from tests.field.strangers import place as place

Capsys = pytest.CaptureFixture[str]

SLOW = ("(a+)+$", "(.*a){20}", r"(\w*)*x", "(a|aa)+b", "(?=(a+))a*b", r"(a)\1+", ".*.*.*.*.*x", "a?" * 30 + "a" * 30,
        "(a|a)" * 20 + "b", "x" * 2000, "(", "a{99999999999}")  # fmt: skip
PLAIN = (r".*\.(q_proj|v_proj)", r"model\.layers\.\d+\.mlp\..*", "q_proj", r".*self_attn.*(q|k|v)_proj$", "[a-z_]+")


@pytest.mark.parametrize("pattern", SLOW)
def test_expressions_that_take_minutes_are_refused(place: Path, tmp_path: Path, capsys: Capsys, pattern: str) -> None:
    with pytest.raises(ValueError, match="is refused"):
        check_pattern(pattern, "here")
    keys: tuple[dict[str, Any], ...] = (
        {"target_modules": pattern},
        {"exclude_modules": pattern},
        {"modules_to_save": [pattern]},
        {"layers_pattern": pattern, "layers_to_transform": [0]},
        {"rank_pattern": {pattern: 2}},
        {"alpha_pattern": {pattern: 2}},
    )
    for i, values in enumerate(keys):
        folder = adapter(place, tmp_path / f"{i}", **values)
        assert_refused(capsys, arguments("eval", folder, place / "text", tmp_path / "out"), "is refused")


@pytest.mark.parametrize("pattern", PLAIN)
def test_plain_expressions_are_taken(pattern: str) -> None:
    check_pattern(pattern, "here")


CONFIGS: dict[str, dict[str, Any]] = {
    "no match": {"target_modules": ["nothing"]},
    "more targets": {"target_modules": ["q_proj", "v_proj", "up_proj"]},
    "fewer targets": {"target_modules": ["q_proj"]},
    "another rank": {"r": 3},
    "a vast rank": {"r": 10**4},
    "a rank beyond": {"r": 10**9},
    "rank by text": {"r": "2"},
    "rank of nothing": {"r": 0},
    "not a number": {"lora_alpha": float("nan")},
    "a table": {"r": {"a": 1}},
    "targets a number": {"target_modules": 5.5},
    "targets a table": {"target_modules": {"q_proj": 1}},
    "bias": {"bias": "nope"},
    "task": {"task_type": "NOPE"},
    "no kind": {"peft_type": None},
    "layers repeated": {"layer_replication": [[0, 2], [0, 2]]},
    "a new module": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_does_not_fit(place: Path, tmp_path: Path, capsys: Capsys, name: str) -> None:
    folder = adapter(place, tmp_path / "adapter", **CONFIGS[name])
    for verb in ("eval", "export"):
        assert_refused(capsys, arguments(verb, folder, place / "text", tmp_path / verb), "adapter")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000])
def test_a_config_that_is_none(place: Path, tmp_path: Path, capsys: Capsys, content: str) -> None:
    folder = adapter(place, tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(content)
    assert_refused(capsys, arguments("eval", folder, place / "text", tmp_path / "out"), "adapter_config.json")


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "empty", "half"])
def test_only_whole_regular_files(place: Path, tmp_path: Path, capsys: Capsys, file: str, kind: str) -> None:
    folder = adapter(place, tmp_path / "adapter")
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    {
        "pipe": lambda path: os.mkfifo(path),
        "device": lambda path: path.symlink_to("/dev/zero"),
        "empty": lambda path: path.touch(),
        "half": lambda path: path.write_bytes(content[: len(content) // 2]),
    }[kind](folder / file)
    assert_refused(capsys, arguments("eval", folder, place / "text", tmp_path / "out"), "adapter")


def test_tensors_that_are_no_numbers(place: Path, tmp_path: Path, capsys: Capsys) -> None:
    folder = adapter(place, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key: value * float("nan") for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    assert_refused(capsys, arguments("eval", folder, place / "text", tmp_path / "out"), "holds NaN or infinity")


def test_an_adapter_is_no_model(place: Path, tmp_path: Path, capsys: Capsys) -> None:
    folder = adapter(place, tmp_path / "adapter")
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ):  # with these, transformers would follow to its base model
        shutil.copy(place / "model" / name, folder)
    assert_refused(capsys, arguments("finetune", folder, place / "text", tmp_path / "out"), "is an adapter")


@pytest.fixture(scope="module")
def sparse(place: Path) -> Path:
    """A saved model with a router and permutations."""
    from sparsetrain import RoutedFFN

    loaded = load(place / "model")
    handle = sparsify(loaded.model, RoutedFFN(num_blocks=4, num_active=2))
    return save(loaded.model, handle, place / "sparse", tokenizer=loaded.tokenizer)


SIDECARS: dict[str, dict[str, Any]] = {
    "format": {"format": "1"},
    "configs a table": {"configs": {}},
    "configs of numbers": {"configs": [5]},
    "another method": {"configs": [{"method": "nope"}]},
    "another key": {"configs": [{"method": "routed_ffn", "nope": 1}]},
    "types": {"configs": [{"method": "routed_ffn", "num_blocks": "four"}]},
    "sizes": {"configs": [{"method": "routed_ffn", "num_blocks": 3}]},
    "another count": {"configs": [{"method": "routed_ffn", "num_blocks": 2, "num_active": 1}]},
    "no class": {"model_class": None},
    "a function": {"model_class": "pipeline"},
    "a class of ours": {"model_class": "Trainer"},
    "a path": {"model_class": "os.system"},
    "another family": {"model_class": "GPT2LMHeadModel"},
    "a number": {"model_class": 5},
    "task": {"task": ["lm"]},
    "labels": {"model_options": {"id2label": {"0": "a", "2": "b"}}},
    "labels by number": {"model_options": {"id2label": 5}},
    "padding": {"model_options": {"pad_token_id": -1}},
    "dropout": {"model_options": {"attention_dropout": "x"}},
}


@pytest.mark.parametrize("name", SIDECARS)
def test_a_sidecar_that_does_not_fit(place: Path, sparse: Path, tmp_path: Path, capsys: Capsys, name: str) -> None:
    folder = changed(sparse, tmp_path / "sparse", "sparsity_config.json", **SIDECARS[name])
    (folder / "manifest.json").unlink()
    assert_refused(capsys, arguments("eval", folder, place / "text", tmp_path / "out"))


@pytest.mark.parametrize(
    "entry", [5, {"a": 5}, {"../model/config.json": {"bytes": 1, "sha256": "0"}}, {"/etc/passwd": {}}]
)
def test_a_manifest_lists_files_of_its_folder(
    place: Path, sparse: Path, tmp_path: Path, capsys: Capsys, entry: object
) -> None:
    folder = changed(sparse, tmp_path / "sparse", "manifest.json", files=entry)
    assert_refused(capsys, arguments("eval", folder, place / "text", tmp_path / "out"), "manifest.json")


@pytest.mark.parametrize("kind", ["pipe", "empty", "missing", "other"])
def test_a_state_that_does_not_fit(place: Path, sparse: Path, tmp_path: Path, capsys: Capsys, kind: str) -> None:
    folder = tmp_path / "sparse"
    shutil.copytree(sparse, folder)
    (folder / "manifest.json").unlink()
    path = folder / "sparsity_state.safetensors"
    tensors = load_file(path)
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()
    elif kind == "other":
        save_file({key: value[:1].clone() for key, value in tensors.items()}, path)
    assert_refused(capsys, arguments("eval", folder, place / "text", tmp_path / "out"))


def test_messages_quote_little_and_escape(place: Path, tmp_path: Path, capsys: Capsys) -> None:
    folder = adapter(place, tmp_path / "adapter", **{"\x1b[31m" + "k" * 10_000: "v" * 1_000_000})
    line = assert_refused(capsys, arguments("eval", folder, place / "text", tmp_path / "out"), "\\x1b[31m")
    assert len(line) < 700
    about = {"format": 1, "configs": [], "model_class": "\x1b" * 9000}
    (folder / "sparsity_config.json").write_text(json.dumps(about | {"base_model": str(place / "model")}))
    assert_refused(capsys, arguments("eval", folder, place / "text", tmp_path / "out"))
