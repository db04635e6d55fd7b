"""What the trained model answers: the right prompts, the deployed model, and no run lost for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsetrain.data.prompts import TEXT_PROMPT_TOKENS, prompt_of, spread
from sparsetrain.hf.train import samples as samples_module
from sparsetrain.hf.train.finetune import finetune
from tests.hf import runs


def test_a_prompt_ends_where_the_first_answer_begins() -> None:
    ids, labels = list(range(10)), [-100, -100, -100, 3, 4, 5, -100, 7, 8, 9]
    assert prompt_of(ids, labels, 48) == ([0, 1, 2], [3, 4, 5])  # the second answer is not the first one's
    assert prompt_of(ids, labels, 2) == ([0, 1, 2], [3, 4])
    assert prompt_of(ids, [-100] * 10, 4) == (ids, [])


def test_plain_text_is_cut_in_two() -> None:
    ids = list(range(400))
    prompt, reference = prompt_of(ids, ids, 48)
    assert (prompt, reference) == (ids[:TEXT_PROMPT_TOKENS], ids[TEXT_PROMPT_TOKENS : TEXT_PROMPT_TOKENS + 48])
    assert prompt_of(ids[:8], [-100, *ids[1:8]], 48) == (ids[:4], ids[4:8])


def test_prompts_are_spread_over_the_rows() -> None:
    assert spread(10, 3) == [0, 3, 6] and spread(2, 3) == [0, 1] and spread(0, 3) == []


def test_a_side_of_a_comparison_records_what_its_trained_model_answers(tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path, methods=[runs.ROUTED], deploy="dense", steps=2)
    models: list[Any] = []
    plain = samples_module.samples

    def watched(model: Any, parts: Any) -> Any:
        models.append((model, parts))
        return plain(model, parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples_module, "samples", watched)
        result = finetune(recipe, like=recipe, write=False)
    found = result.run["samples"]
    assert len(found) == 3 and all(set(each) == {"prompt", "reference", "completion"} for each in found)
    model, parts = models[0]
    row = parts.bundle.collate_fn([parts.bundle.eval[0]])
    ids_bt, most = row["input_ids"][:, :32], samples_module.TOKENS
    for _ in range(most):  # greedy, by hand, on the dense model
        with torch.no_grad():
            model.eval()
            next_b = model(input_ids=ids_bt).logits[:, -1].argmax(-1)
        ids_bt = torch.cat([ids_bt, next_b[:, None]], 1)
        if next_b.item() == parts.tokenizer.eos_token_id:
            break
    assert found[0]["completion"] == parts.tokenizer.decode(ids_bt[0, 32:], skip_special_tokens=True)
    assert found[0]["prompt"] == parts.tokenizer.decode(row["input_ids"][0, :32], skip_special_tokens=True)
    alone = finetune(recipe.model_copy(update={"output": str(tmp_path / "alone")}), write=False)
    assert "samples" not in alone.run  # nobody waits for what nobody compares
    assert [s["loss"] for s in alone.run["steps"]] == [s["loss"] for s in result.run["steps"]]


def test_a_model_that_cannot_generate_loses_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise NotImplementedError("no cache for this model\nand more")

    monkeypatch.setattr(samples_module, "samples", fail)
    recipe = runs.recipe(tmp_path, steps=1)
    result = finetune(recipe, like=recipe, write=False)
    assert "No sample completions: NotImplementedError: no cache for this model" in result.notes
    assert result.saved.is_dir()


def test_no_prompt_is_begun_when_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = samples_module.samples
    monkeypatch.setattr(samples_module, "samples", lambda model, parts: plain(model, parts, seconds=0))
    recipe = runs.recipe(tmp_path, steps=1)
    assert finetune(recipe, like=recipe, write=False).run["samples"] == []
