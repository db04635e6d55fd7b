"""finetune with streaming: it trains on the rows behind the first, goes on at its row, and says what it cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparsetrain.hf.train.finetune import finetune
from sparsetrain.hf.train.pretrain import pretrain
from sparsetrain.recipes.finetune import Recipe
from tests.hf import runs
from tests.hf import test_pretrain as pretraining
from tests.hf.data.files import write_jsonl
from tests.hf.test_checkpoint import StopAt, losses, resume, stopped


def streamed(folder: Path, **changes: Any) -> Recipe:
    rows = [{"prompt": f"{runs.WORDS[i % 15]} {runs.WORDS[i // 15]}", "completion": "sun moon ."} for i in range(40)]
    (folder / "data").mkdir(exist_ok=True)
    data = write_jsonl(folder / "data" / "a.jsonl", rows)
    asked = {"data": str(data), "task": "sft", "streaming": True, "stream_rows": 12, "eval_tokens": 64}
    return runs.recipe(folder, **asked | changes)


def test_an_interrupted_run_goes_on_at_its_row_of_the_second_pass(tmp_path: Path) -> None:
    recipe = streamed(tmp_path, steps=26, save_every=10)
    whole = finetune(recipe, write=False)
    again = recipe.model_copy(update={"output": str(tmp_path / "again")})
    stopped(again, 23)
    continued = resume(again)
    assert losses(continued) == losses(whole) and len(set(losses(whole))) == 26 and continued.resumed_from == 20
    assert "streamed: these are the first 12, and others follow" in whole.data


def test_text_is_streamed_and_packed(tmp_path: Path) -> None:
    result = finetune(runs.recipe(tmp_path, streaming=True, stream_rows=3, steps=20, packing=True), write=False)
    assert "streamed: these are the first 3" in result.data and len(losses(result)) == 20


def test_other_rows_are_another_run(tmp_path: Path) -> None:
    recipe = streamed(tmp_path)
    stopped(recipe, 3)
    with pytest.raises(ValueError, match="stream_rows: 12 there, 13 here"):
        finetune(recipe.model_copy(update={"resume": True, "stream_rows": 13}), write=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 1.0}, "needs the number of rows. Give steps"),
        ({"task": "classify"}, "task=classify needs all rows at once"),
        ({"packing": True}, "packing puts rows together by their lengths"),
        ({"streaming": False}, "stream_rows=12 is for streaming=true"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        streamed(tmp_path, **changes)


def test_several_ranks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsetrain.hf.train.rows import load_rows

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="one process reads the rows"):
        load_rows(streamed(tmp_path), None, None, print)


@pytest.mark.parametrize(
    "changes",
    [{}, {"task": "mlm"}, {"methods": ["multi_level:start_share=0.2,small_share=0.4"]}],
    ids=["lm", "mlm", "in stages"],
)
def test_random_weights_are_trained_on_a_stream(changes: dict[str, Any], tmp_path: Path) -> None:
    data = runs.text(tmp_path / "text", files=20, words=90)
    model = "sequence-encoder" if changes.get("task") == "mlm" else "gpt2-nano"
    asked = {"data": str(data), "streaming": True, "stream_rows": 4, "steps": 14, "save_every": 5}
    recipe = pretraining.recipe(tmp_path, model, **asked | changes)
    whole = pretrain(recipe, write=False)
    again = recipe.model_copy(update={"output": str(tmp_path / "again")})
    with pytest.raises(KeyboardInterrupt):
        pretrain(again, callbacks=[StopAt(13)], write=False)
    continued = pretrain(again.model_copy(update={"resume": True}), write=False)
    assert losses(continued) == losses(whole) and len(set(losses(whole))) == 14 and continued.resumed_from == 10
    assert "streamed: these are the first 4, and others follow" in whole.data
