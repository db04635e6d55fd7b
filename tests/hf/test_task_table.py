"""The table of tasks: each row is whole, and a package can bring one with a loss, scores and a metric of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsetrain.core.metrics import METRICS, Metric, register_metric
from sparsetrain.hf.model.io import Loaded, load
from sparsetrain.hf.train.finetune import finetune
from sparsetrain.hf.train.tasks import Scores, next_token_scores, training_loss
from sparsetrain.measure.report import build_report, render_text
from sparsetrain.recipes.finetune import Recipe
from sparsetrain.recipes.pretrain import PretrainRecipe
from sparsetrain.recipes.tasks import TASKS, Task, named, offered, register_task, task_of
from sparsetrain.runs.quality import Quality
from tests.hf import runs

HERE = __name__
HALVES = replace(
    TASKS["lm"],
    name="halves",
    says={"finetune": "halves a next token, at half the loss, and its size"},
    metric="hit_share",
    scores=f"{HERE}:scores",
    loss=f"{HERE}:loss",
)


def scores(model: Any, batch: Any) -> Scores:
    """As next tokens, with the share of those that were guessed: a metric that is counted, and no perplexity."""
    found = next_token_scores(model, batch)
    guessed = model(input_ids=batch["input_ids"]).logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]
    return Scores(found.loss, found.count, {"hit_share": float(guessed.sum()), "tokens_seen": float(found.count)})


def loss(model: Any, batch: Any) -> torch.Tensor:
    """Two losses: the model's, at half its weight, and a penalty."""
    out = model(**batch)
    return out.loss / 2 + 0.0 * out.logits.square().mean()


@pytest.fixture
def halves() -> Iterator[Task]:
    register_metric(Metric(name="hit_share", more_is_better=True, is_share=True, tie=0.005))
    register_task(HALVES)
    yield HALVES
    del TASKS["halves"], METRICS["hit_share"]


def test_the_literals_of_recipes_are_the_table() -> None:
    for recipe, job in ((Recipe, "finetune"), (PretrainRecipe, "pretrain")):
        assert recipe.job == job
        assert list(recipe.model_fields["task"].annotation.__args__) == offered(job)  # type: ignore[union-attr]


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_what_a_row_names_is_there(task: Task) -> None:
    for place in (*task.classes, task.scores, *filter(None, (task.rows, task.loss))):
        assert callable(named(place)), place
    assert hasattr(named(task.model), "from_pretrained") and hasattr(named(task.classes[-1]), "from_config")
    assert task.metric in METRICS and set(task.jobs) <= {"finetune", "pretrain"}
    assert task.adapter is not None or "finetune" not in task.jobs


def test_a_slip_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'classify'"):
        task_of("clasify")
    with pytest.raises(
        ValueError,
        match=r"give 'lm', 'sft', 'classify', 'image', 'diffusion' or 'pair-image'\. Did you mean 'classify'",
    ):
        Recipe.from_values({"model": "m", "data": "d", "task": "clasify"})


def test_a_name_is_taken_once_and_judged_by_a_known_metric() -> None:
    register_task(TASKS["lm"])  # an equal one again
    with pytest.raises(ValueError, match="in the table already"):
        register_task(replace(TASKS["lm"], padded=True))
    with pytest.raises(ValueError, match="no metric"):
        register_task(replace(TASKS["lm"], name="other", metric="beauty"))
    with pytest.raises(ValueError, match="in the table already"):
        register_metric(Metric(name="accuracy"))


def test_a_task_from_outside_trains_on_its_own_loss(tmp_path: Path, halves: Task) -> None:
    changes: dict[str, Any] = {"grad_accum": 2, "eval_every": 2, "lora_r": 4, "max_grad_norm": 0.0}
    plain = finetune(runs.recipe(tmp_path, **changes, output=str(tmp_path / "plain")), write=False)
    asked = runs.recipe(tmp_path, **changes, task="halves")
    assert asked.model_dump()["task"] == asked.model_dump(mode="json")["task"] == "halves"
    result = finetune(asked)
    first = [found.run["steps"][0]["loss"] for found in (plain, result)]
    assert first[1] == pytest.approx(first[0] / 2, rel=1e-5)  # type: ignore[operator]
    run: Any = result.run
    assert run["metric"] == "hit_share" and "perplexity" not in run
    assert 0 <= run["hit_share"]["after_training"] <= 1 and run["tokens_seen"]["dense"] == 1.0
    assert all("hit_share" in point for point in run["evals"])
    assert load(result.saved).task == "halves"
    report = build_report(title="t", runs={"dense": plain.run, "sparse": run})
    assert not [row for row in report["judgements"] if row["quantity"] == "quality"]  # nothing in common
    report = build_report(title="t", runs={"dense": run, "sparse": run})
    assert report["judgements"][-1]["text"].startswith("Hit share after training: ")
    assert any(line.startswith("  sparse hit_share: dense ") for line in render_text(report))


def test_scores_without_the_metric_are_refused(tmp_path: Path, halves: Task) -> None:
    TASKS["halves"] = replace(halves, scores=TASKS["lm"].scores)
    with pytest.raises(ValueError, match=r"judged by hit_share, and .*next_token_scores gave no metric"):
        finetune(runs.recipe(tmp_path, task="halves"), write=False)


def test_the_loss_of_other_tasks_is_the_models() -> None:
    model = lambda **batch: type("Output", (), {"loss": batch["input_ids"].sum()})  # noqa: E731
    assert float(training_loss(model, {"input_ids": torch.ones(3)}, "lm")) == 3.0


def test_a_quality_of_an_earlier_version_is_read() -> None:
    earlier = {"loss": 1.0, "perplexity": None, "accuracy": 0.5, "tokens": 8, "rows": 2}
    quality = Quality.from_dict(earlier)
    assert (quality.metric, quality.value, quality.perplexity) == ("accuracy", 0.5, None)
    assert earlier.items() <= quality.to_dict().items() and quality.to_dict()["metrics"] == {"accuracy": 0.5}
    assert Quality.from_dict(quality.to_dict()) == quality


def test_the_task_of_a_plain_model_is_that_of_its_class() -> None:
    kinds = {"LlamaForCausalLM": "lm", "GPT2LMHeadModel": "lm", "BertForSequenceClassification": "classify"}
    kinds |= {"ViTForImageClassification": "image", "EncoderClassifier": "classify"}
    for name, task in kinds.items():
        model = type(name, (), {})()
        assert Loaded(model=model, tokenizer=None, handle=None, about={}).task == task, name
    assert Loaded(model=None, tokenizer=None, handle=None, about={"task": "pairs"}).task == "pairs"
