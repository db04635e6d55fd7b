"""Values that nobody means, in flags, recipe files and configs: named with what is taken, before anything is read."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

import sparsetrain.methods  # noqa: F401  (enters them in the registry)
from sparsetrain.cli import run
from sparsetrain.core.config import MethodConfig, registered_methods
from sparsetrain.core.fields import accepted, field_hints, kind_of
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.recipes.pretrain import PretrainRecipe

NAN, INF = float("nan"), float("inf")
ODD: list[Any] = [True, "x", "", 1.5, NAN, INF, -INF, -1, 10**30, 10**5000, None, [], {}, [None], {"a": 1}, b"x"]
ODD += [object(), [[]] * 3, "\ud800", "x" * 10_000, "\x1b[31m", (1, 2), [True], [1.5], [-1], range(3)]


def fields() -> list[tuple[str, str]]:
    kinds = registered_methods().items()
    return [(method, field.name) for method, kind in kinds for field in dataclasses.fields(kind)]


@pytest.mark.parametrize(("method", "name"), fields())
def test_every_field_of_every_method(method: str, name: str) -> None:
    """What is taken is of the field's type; what is not is refused by name, in one short printable line."""
    kind = registered_methods()[method]
    hint = field_hints(kind)[name]
    for value in ODD:
        for make in (lambda v: kind(**{name: v}), lambda v: MethodConfig.from_dict({"method": method, name: v})):
            try:
                found = getattr(make(value), name)
            except ValueError as error:
                text = str(error)
                assert text.startswith(method) and len(text) < 700 and text.isprintable(), text
                continue
            assert found is None or _fits(kind_of(hint), found), (value, found)
    with pytest.raises(ValueError, match=rf"^{method}: {name}="):
        kind(**{name: object()})  # type: ignore[arg-type]
    assert "Any" not in accepted(hint)


def _fits(kind: Any, value: Any) -> bool:
    if kind in (int, float, str, bool):
        return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or value is not True)
    return isinstance(value, tuple) and all(type(item) in (int, str) for item in value)


@pytest.mark.parametrize("kind", [Recipe, PretrainRecipe])
def test_every_key_of_every_recipe(kind: type[Recipe | PretrainRecipe]) -> None:
    for key in [*kind.model_fields, "preset"]:
        for value in ODD:
            try:
                made = kind.from_values({"model": "m", "data": "d", key: value})
            except ValueError as error:
                assert len(str(error)) < 2000 and str(error).replace("\n", "").isprintable(), (key, value)
                continue
            text = made.to_yaml()
            assert "\x1b" not in text and ".nan" not in text and ".inf" not in text, (key, value)
            if key not in ("preset", "resume", "methods", "lora_targets", "compare_lr"):
                assert (
                    value is None
                    or isinstance(value, list | dict | tuple)
                    or made.model_dump()[key] == (float(value) if isinstance(value, int) else value)
                ), (key, value)


HEAD = "model: m\ndata: d\n"
ALIASES = "a: &a [x]\n" + "\n".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEAD + "steps: 1\nsteps: 2\n", "'steps' is given twice"),
        (HEAD + "methods: [{method: routed_ffn, gate: ste, gate: spt}]\n", "'gate' is given twice"),
        (HEAD + "methods: ['routed_ffn:num_blocks=4,num_blocks=8']\n", "'num_blocks' is given twice"),
        (HEAD + "methods: [{method: routed_ffn, layers: [1.5]}]\n", "layers=[1.5]"),
        (HEAD + "methods: [{method: routed_ffn, layers: [true]}]\n", "layers=[True]"),
        (HEAD + "methods: [{method: routed_ffn, layers: [-1]}]\n", "counted from 0"),
        (HEAD + "methods: [{method: routed_ffn, layers: []}]\n", "counted from 0"),
        (HEAD + "methods: ['routed_ffn:layers=0-99999999999']\n", "layers='0-99999999999'"),
        (HEAD + "methods: ['routed_ffn:layers=5-2']\n", "layers='5-2'"),
        (HEAD + "methods: [{method: routed_ffn, num_blocks: true}]\n", "num_blocks=True"),
        (HEAD + "methods: [{method: routed_ffn, rescale: 1}]\n", "true or false"),
        (HEAD + "methods: [{method: routed_ffn, gate: [output]}]\n", "Choose from ('output', 'ste', 'spt')"),
        (HEAD + "methods: [{method: routed_ffn, partition: null}]\n", "Choose from ('contiguous', 'clustered')"),
        (HEAD + "methods: [{method: [a]}]\n", "unknown method ['a']"),
        (HEAD + "preset: {a: b}\n", "unknown preset"),
        (HEAD + "steps: true\n", "steps=true"),
        (HEAD + "lr: .nan\n", "finite"),
        (HEAD + "lr: 1e400\n", "finite"),
        (HEAD + "epochs: .inf\n", "finite"),
        (HEAD + "seq_len: 99999999999\n", "seq_len=99999999999"),
        (HEAD + f"seq_len: {'9' * 5000}\n", "cannot be read"),
        (HEAD + "lora_targets: []\n", "q_proj,v_proj"),
        (HEAD + "output: ''\n", "it is empty"),
        (HEAD + "output: null\n", "output=None"),
        (HEAD + 'text_column: "a\\0b"\n', "no text"),
        ("model: m\ndata: ' '\n", "data=' ': it is empty"),
        ("model: m\ndata: 2024-99-99\n", "cannot be read"),
        (HEAD + "1: 2\n", "its key 1"),
        (HEAD + "? [a]\n: b\n", "unhashable"),
        (ALIASES, "alias"),
        (HEAD + "steps: " + "[" * 100_000, "nest deeper"),
        (HEAD + "steps: " + "{a: " * 50 + "}" * 50, "nest deeper"),
        ("x" * 300_000, "262,144"),
        ("!!python/object/apply:os.system ['false']", "recipe"),
        ("model: \ud800", "UTF-8"),
        ("", "NoneType"),
        ("- a", "list"),
    ],
)
def test_recipe_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode(errors="surrogateescape" if "\udc80" <= text[-1:] <= "\udcff" else "surrogatepass"))
    began = time.process_time()
    with pytest.raises(ValueError, match=re.escape(words)) as raised:
        Recipe.from_yaml(path)
    assert len(str(raised.value)) < 1000 and str(raised.value).isprintable()
    assert time.process_time() - began < 10


def test_what_a_recipe_may_be(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("\ufeff".encode() + (HEAD + "steps: 3.0\nlora_targets: q_proj, v_proj\n").encode())
    made = Recipe.from_yaml(path)
    assert made.steps == 3 and made.lora_targets == ["q_proj", "v_proj"]
    path.write_text(HEAD + "methods: [{method: routed_ffn, layers: 3, targets: 'a*'}]\n")
    assert Recipe.from_yaml(path).configs[0].layers == (3,)
    made.to_yaml(path)
    assert Recipe.from_yaml(path) == made


def test_recipes_that_are_no_regular_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    places = [
        tmp_path / "pipe",
        tmp_path / "link",
        tmp_path,
        "/dev/zero",
        "/dev/null",
        "x" * 300,
        "a\0b",
        tmp_path / "no",
    ]
    for place in places:
        with pytest.raises(ValueError, match="cannot be read"):
            Recipe.from_yaml(place)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("a=[", "not valid YAML"),
        ("=1", "key and '='"),
        ("a", "key and '='"),
        ("a=&x [*x]", "alias"),
        ("a=" + "[" * 1000, "nest deeper"),
        ("a=" + "9" * 5000, "cannot be read"),
    ],
)
def test_values_of_set(value: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PretrainRecipe.from_values({"model": "gpt2-nano", "data": "d", "set": [value]})
    for odd in (NAN, INF, [1, NAN], {"b": object()}):
        with pytest.raises(ValueError, match="set="):
            PretrainRecipe.from_values({"model": "gpt2-nano", "data": "d", "set": {"a": odd}})
    with pytest.raises(ValueError, match="twice"):
        PretrainRecipe.from_values({"model": "gpt2-nano", "data": "d", "set": ["a=1", "a=2"]})


MODEL = ["--model", "gpt2-nano", "--data", "d"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["finetune", *MODEL[:2], "--data", ""], "empty (--data)"),
        (["finetune", *MODEL, "--output="], "empty (--output)"),
        (["finetune", *MODEL, "--output", "  "], "empty (--output)"),
        (["eval", ""], "empty"),
        (["export", "", "--output", "x"], "empty"),
        (["finetune", *MODEL, "--output", "\udcff"], "UTF-8"),
        (["finetune", *MODEL, "--epochs", "inf"], "epochs"),
        (["finetune", *MODEL, "--epochs", "nan"], "epochs"),
        (["finetune", *MODEL, "--lora-targets", ","], "q_proj,v_proj"),
        (["finetune", *MODEL, "--steps", "true"], "steps"),
        (["bench", *MODEL, "--rounds", "0"], "--rounds 0"),
        (["bench", *MODEL, "--rounds", "-1"], "--rounds -1"),
        (["bench", *MODEL, "--layers", "0"], "--layers 0"),
        (["bench", *MODEL, "--methods", ","], "--methods is empty"),
        (["bench", *MODEL, "--methods", " , ,"], "--methods is empty"),
        (["bench", *MODEL, "--methods", "x" * 5000], "Use all, or some of"),
        (["profile", *MODEL, "--steps", "0"], "steps"),
        (["profile", *MODEL, "--plot", "."], "--plot . is a folder"),
        (["profile", *MODEL, "--plot", "x.gif"], ".png or .html"),
        (["plan", *MODEL, "--plot", "."], "--plot . is a folder"),
        (["plan", *MODEL, "--plot", "x"], ".png or .svg or .pdf"),
        (["plan", *MODEL, "--write", "/dev/null"], "device"),
        (["plan", *MODEL, "--write", "x.txt"], ".yaml"),
        (["plan", *MODEL, "--memory", "1e400GB"], "--memory"),
        (["plan", *MODEL, "--memory", "9" * 5000], "--memory"),
        (["plan", *MODEL, "--memory", "nan"], "--memory"),
        (["plan", *MODEL, "--memory", "-5GB"], "--memory"),
        (["plan", *MODEL, "--memory", "1e-9B"], "--memory"),
        (["plan", *MODEL, "--memory", "24GB", "--seq-len", "0"], "seq_len"),
        (["plan", *MODEL, "--gpu", "/dev/zero"], "unknown machine"),
        (["plan", *MODEL, "--goal", "\x1b[31m"], "\\x1b[31m"),
        (["sensitivity", *MODEL, "--budget", "nan"], "--budget"),
        (["sensitivity", *MODEL, "--budget", "inf"], "--budget"),
        (["sensitivity", *MODEL, "--budget", "1.2", "--write", "."], "--write . is a folder"),
        (["methods", "x" * 10_000], "unknown method"),
        (["methods", "\x1b[31m"], "unknown method"),
        (["models", "verify", "\x1b[31m" + "x" * 1000], "embedded asset"),
    ],
)
def test_flags(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, error = run(arguments), capsys.readouterr().err
    assert code == 2 and words in error and "report" not in error.replace("report.html", ""), error
    assert len(error) < 2500 and error.replace("\n", "").isprintable()
    assert os.listdir(tmp_path) == []
