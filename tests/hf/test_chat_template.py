"""A recipe's chat template: what is learnt is rendered with it, and it goes with the trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsetrain.core.errors import CheckpointError
from sparsetrain.hf.model.io import load
from sparsetrain.hf.train.assemble import open_parts
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.recipes.finetune import Recipe
from tests.hf import runs

TEMPLATE = (
    "{% for m in messages %}<s> {% if m.role == 'user' %}sun{% else %}moon{% endif %} {{ m.content }} </s>"
    "{% endfor %}{% if add_generation_prompt %}<s> moon{% endif %}"
)


def recipe(folder: Path, **changes: Any) -> Recipe:
    folder.joinpath("chat.jinja").write_text(TEMPLATE)
    talk = [{"role": "user", "content": "red green"}, {"role": "assistant", "content": "blue star"}]
    rows = [{"messages": [*talk, {"role": "user", "content": f"runs {i}"}]} for i in range(40)]
    folder.joinpath("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    usual = {"data": str(folder / "rows.jsonl"), "task": "sft", "deploy": "dense", "dtype": "fp32", "steps": 2}
    return runs.recipe(folder, **usual | {"chat_template_path": str(folder / "chat.jinja")} | changes)


def opened(asked: Recipe) -> tuple[Any, list[str]]:
    notes: list[str] = []
    return open_parts(asked, lambda event: notes.append(event["text"])), notes


def test_rows_are_rendered_with_it_and_the_trained_model_has_it(tmp_path: Path) -> None:
    asked = recipe(tmp_path)
    parts, _ = opened(asked)
    row = parts.bundle.train[0]
    words = parts.tokenizer.decode([label for label in row["labels"] if label != -100])
    assert parts.tokenizer.decode(row["input_ids"]).startswith("<s> sun red green </s> <s> moon blue star </s>")
    assert words == "blue star </s>"
    finetune(asked, write=False)
    trained = load(tmp_path / "out").tokenizer
    assert trained.chat_template == TEMPLATE
    assert Recipe.from_yaml(tmp_path / "out/recipe.yaml").chat_template_path == str(tmp_path / "chat.jinja")


def test_it_may_be_that_of_a_model_or_its_text(tmp_path: Path) -> None:
    other = runs.llama(tmp_path / "other")
    tokenizer = runs.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(other)
    for given in (str(other), TEMPLATE):
        assert opened(recipe(tmp_path, chat_template_path=given))[0].tokenizer.chat_template == TEMPLATE


def test_tokens_that_the_tokenizer_lacks_are_noted(tmp_path: Path) -> None:
    _, notes = opened(recipe(tmp_path, chat_template_path=TEMPLATE.replace("<s> ", "<|im_start|> ")))
    assert any("writes <|im_start|>, for which the tokenizer has no token" in note for note in notes)


def test_a_run_goes_on_with_the_same_template_alone(tmp_path: Path) -> None:
    """One run: the others are refused before they begin."""
    finetune(recipe(tmp_path, save_every=1), write=False)
    (tmp_path / "out/result.json").unlink()
    (tmp_path / "other.jinja").write_text(TEMPLATE)
    other = recipe(tmp_path, save_every=1, resume=True, chat_template_path=str(tmp_path / "other.jinja"))
    with pytest.raises(CheckpointError, match="chat_template_path"):
        finetune(other, write=False)
    same = recipe(tmp_path, save_every=1, resume=True)
    (tmp_path / "chat.jinja").write_text(TEMPLATE.replace("sun", "star"))
    with pytest.raises(CheckpointError, match="other rows"):
        finetune(same, write=False)
    assert "chat_template_path" not in recipe(tmp_path, chat_template_path=None).training_values()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("none.jinja", "is not there. Name a Jinja file"),
        ("./none", "is not there"),
        ("{% for m in messages %}", "does not render a question and its answer (TemplateSyntaxError"),
        ("{{ raise_exception('no') }}", "does not render a question and its answer (TemplateError: no)"),
        ("{{ messages[0].content }}", "leaves out what the assistant says"),
        ("MODEL", "has no chat template. Name an instruction model"),
        ("ROWS", "holds no Jinja"),
        ("BINARY", "cannot be read as text"),
    ],
)
def test_a_wrong_template_is_told_in_a_line(tmp_path: Path, given: str, says: str) -> None:
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe{{")
    (tmp_path / "plain.txt").write_text("Hello")
    places = {"MODEL": str(tmp_path / "model"), "ROWS": str(tmp_path / "plain.txt")}
    places |= {"BINARY": str(tmp_path / "binary.jinja")}
    with pytest.raises(ValueError, match="chat_template_path=") as error:
        opened(recipe(tmp_path, chat_template_path=places.get(given, given)))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_it_is_for_conversations(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task=lm has none"):
        recipe(tmp_path, task="lm")
