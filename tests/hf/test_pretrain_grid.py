"""pretrain --grid: the same losses on every grid, resumed on another one, and a model that transformers loads."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import distributed
from transformers import AutoModelForCausalLM

from sparsetrain.hf.train.grid import pretrain_on_grid
from sparsetrain.parallel.linear import Mode
from sparsetrain.parallel.shape import GridShape
from sparsetrain.recipes.pretrain import PretrainRecipe
from tests.parallel.ranks import assert_on_ranks

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]


def recipe(folder: str, output: str, **changes: object) -> PretrainRecipe:
    values = {"model": "gpt2-nano", "set": {"n_layer": 2, "n_embd": 32, "n_head": 4}, "data": f"{folder}/notes.txt"}
    values |= {"seq_len": 32, "batch_size": 4, "steps": 4, "eval_tokens": 512, "output": f"{folder}/{output}"}
    return PretrainRecipe.from_values({**values, "grad_accum": 2, "save_every": 2, "warmup_steps": 1, **changes})


def on_two_ranks(folder: str) -> None:
    cases: tuple[tuple[str, Mode], ...] = (("data=2", "plain"), ("x=2", "plain"), ("y=2", "expert"), ("z=2", "expert"))
    losses = []
    for grid, mode in cases:
        result = pretrain_on_grid(recipe(folder, grid), GridShape.from_text(grid), mode)
        losses += [result["losses"]] if result is not None else []
    again = pretrain_on_grid(recipe(folder, "x=2", resume=True), GridShape(y=2), "expert")
    assert (again is None) == (distributed.get_rank() != 0)  # the first rank answers, and judges
    if again is None:
        return
    assert losses[0][-1] < losses[0][0] and len(again["losses"]) == 4
    for other in [*losses[1:], again["losses"]]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(losses[0]), rtol=0, atol=2e-5)
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/x=2/model")
    other = AutoModelForCausalLM.from_pretrained(f"{folder}/data=2/model")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), rtol=0, atol=1e-3)


def test_two_ranks(tmp_path: Path) -> None:
    """Two processes: some fifteen seconds, half of them imports."""
    choose = random.Random(0)
    (tmp_path / "notes.txt").write_text(" ".join(choose.choice(WORDS) for _ in range(3000)))
    assert_on_ranks(on_two_ranks, 2, str(tmp_path))


def test_what_does_not_go_on_a_grid_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(str(tmp_path), "out")
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        pretrain_on_grid(asked, GridShape(x=2))
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    with pytest.raises(ValueError, match=r"output=.* holds something already"):
        pretrain_on_grid(asked, GridShape(x=2))
    with pytest.raises(ValueError, match=r"methods=.*a grid trains dense models"):
        pretrain_on_grid(recipe(str(tmp_path), "new", methods=["semi_structured"]), GridShape(x=2))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"eval_every": 2, "early_stopping": 3}, "early_stopping=3 .*takes all its steps. Leave it out"),
        (
            {"eval_every": 2, "load_best_model_at_end": True},
            "load_best_model_at_end=True .*evaluates nothing while it trains",
        ),
        ({"eval_every": 2}, "eval_every=2 .*evaluates nothing while it trains"),
        ({"ema_decay": 0.9}, "ema_decay=0.9 .*keeps no average"),
        ({"clip_value": 1.0}, "clip_value=1.0 .*clips by max_grad_norm alone"),
        ({"min_lr_ratio": 0.1}, "min_lr_ratio=0.1 .*falls to 0"),
        ({"gradient_checkpointing": "reentrant"}, "gradient_checkpointing='reentrant' .*recomputes nothing"),
    ],
    ids=str,
)
def test_what_a_grid_would_ignore_is_refused(
    changes: dict[str, object], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=why):
        pretrain_on_grid(recipe(str(tmp_path), "out", **changes), GridShape(x=2))
